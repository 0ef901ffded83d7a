"""Folders that are built once and shared by many processes.

A folder's name holds the hash of all that its content depends on, so that it is either absent or
right. Writers work in a temporary sibling and rename it: a killed writer leaves no half-made
result, and its lock is freed by the operating system.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from swiftmeg.errors import UserError

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return `$SWIFTMEG_CACHE`, or `~/.cache/swiftmeg` if it is not set."""
    return Path(os.environ.get("SWIFTMEG_CACHE") or Path.home() / ".cache" / "swiftmeg")


def content_key(description: Any) -> str:
    """Return a hash (32 hexadecimal digits) of a JSON-able description."""
    text = json.dumps(description, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def get_or_build(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`; if it is absent, one caller makes it with `build` while the others wait.

    `build` is given an empty folder to fill. What it raises reaches its caller, and the next
    caller in line tries again. Raises UserError where the cache takes nothing, because it is full
    or not writable.
    """
    if folder.is_dir():
        return folder
    try:
        return _built(folder, build)
    except OSError as error:
        raise UserError(
            f"the cache {folder.parent} cannot be used ({error}): make room in it, or name another "
            "folder by the environment variable SWIFTMEG_CACHE"
        ) from None


def _built(folder: Path, build: Callable[[Path], None]) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that is preparing %s", folder)
        lock.acquire()
    try:
        if not folder.is_dir():
            _build(folder, build)
    finally:
        lock.release()
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{folder.name}.tmp-"
    # Whoever holds the lock is the only writer, so these belong to writers that were killed.
    for left in folder.parent.glob(prefix + "*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError as error:
            # A shared filesystem without working locks: somebody else was first, with the same
            # content.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
