"""Give a complete folder its name, so that the name never stands for a mixture of two."""

import contextlib
import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from swiftmeg.checkpoint import UNFINISHED

_EXCHANGE = 2
"""RENAME_EXCHANGE of renameat2(2)."""

_HERE = -100
"""AT_FDCWD: paths count from the working directory."""

_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?")
"""Files of weights that are replaced, however many there were."""


@contextlib.contextmanager
def building(folder: Path, writes: bool = True) -> Iterator[Path]:
    """A hidden folder beside `folder` that becomes it if all goes well, and is removed if not.

    Several ranks may write into it; `writes` is true on the one that makes and publishes it, which
    the others wait for.
    """
    unfinished = folder.parent / f".{folder.name}{UNFINISHED}"
    try:
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        yield unfinished
        if writes:
            publish(unfinished, folder)
    finally:
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)


def publish(complete: Path, folder: Path) -> None:
    """Let `complete`, a folder beside `folder`, be `folder`.

    What `folder` held and `complete` does not, comes along, unless it is a part of the old weights.
    Killed at any moment, `folder` is the old one or the new one, on file systems that can exchange
    two names; on others it may be missing for an instant, and the old one is `.NAME.previous`.
    """
    previous = folder.parent / f".{folder.name}.previous"
    if not folder.exists():
        complete.rename(folder)
    else:
        for entry in folder.iterdir():
            kept = complete / entry.name
            if not kept.exists() and not _WEIGHTS.fullmatch(entry.name):
                _bring_along(entry, kept)
        if _exchange(complete, folder):
            previous = complete
        else:
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
            complete.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def _bring_along(entry: Path, place: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, place, symlinks=True, copy_function=_link)
    else:
        _link(entry, place)


def _link(entry: str | Path, place: str | Path) -> None:
    """A second name for a file, or a copy where file systems have no such thing."""
    try:
        os.link(entry, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(entry, place, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0)
