"""Output folders belong to one run: it makes a new one, or locks one that is there."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path
from typing import TextIO

from swiftmeg.errors import UserError

CLAIMS = "SWIFTMEG_CLAIMS"
"""Environment variable: a file that lists what a job has made; its launcher removes what stays
empty, because it ends ranks that have no time to."""

LOCK = ".lock"
"""The file in a folder that a run locks while it writes there; who holds it stands in it."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks say."""

_made: list[Path] = []

_held: dict[Path, TextIO] = {}
"""Locks of this process; closing one gives it up."""


def claim(root: Path, add_version: bool) -> Path:
    """The folder of a run, `root` or a new `root/vN-time`, which no other run writes to.

    UserError if another run has it, or it cannot be made.
    """
    if add_version:
        return claim_version(root)
    lock(root)
    return root


def claim_version(root: Path) -> Path:
    """Make `root/vN-time` with the next free N, of which runs that start together get one each.

    UserError if it cannot be made.
    """
    while True:
        found = [re.match(r"v(\d+)", path.name) for path in root.glob("v*")]
        number = max((int(match[1]) for match in found if match), default=-1) + 1
        folder = root / f"v{number}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            _make(root)
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--save {root}: cannot be written to ({error.strerror})") from None
        _record(folder)
        return folder


def lock(folder: Path) -> None:
    """Lock `folder`, made if need be, until this process ends; UserError if another has it.

    The system gives a lock up when its process ends, however that happens.
    """
    _make(folder)
    path = folder / LOCK
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        file.close()
        raise UserError(
            f"--save {folder}: {holder} is writing there: wait for it or end it, or name another "
            "folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[folder] = file
    _record(path)


def release(folder: Path) -> None:
    """Give up the lock of `folder`, if this process has it."""
    if file := _held.pop(folder, None):
        (folder / LOCK).unlink(missing_ok=True)
        file.close()


def discard_unused() -> None:
    """Remove what this process has made and not used."""
    remove_unused(_made)
    _made.clear()


def remove_unused(made: list[Path]) -> None:
    """Remove what was made, in this order, and nobody has used: empty folders, and locks."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def _make(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _record(path)


def _record(path: Path) -> None:
    _made.append(path)
    if claims := os.environ.get(CLAIMS):
        with open(claims, "a") as file:
            file.write(f"{path}\n")
