"""Folders of Megatron checkpoints: which iterations are whole, and where a run starts from.

An iteration counts only when its last file, `metadata.json`, is there. `TRACKER` names the latest
one; it is replaced in one step after that. Every tensor is an archive with checksums of its own, so
that damage is found without a file beside it.
"""

import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from swiftmeg.errors import UserError
from swiftmeg.json_files import read_object
from swiftmeg.trust import Untrusted

TRACKER = "latest_checkpointed_iteration.txt"
"""The file that names the latest iteration; readers of other programs know it too."""

LAST_FILE = "metadata.json"
"""What Megatron writes when all ranks have written their parts."""

FORMAT = "torch_dist"
"""The format of Megatron's checkpoints that are read and written."""

_COMMON_STATE = "common_state/shard_0_1"
"""The entry that holds the arguments of the run that wrote the checkpoint."""

UNFINISHED = ".unfinished"
"""How the name of a folder ends that is being written; it begins with a dot."""


def refuse_unfinished(flag: str, folder: Path) -> None:
    """UserError for a folder that a killed command has left."""
    if folder.name.endswith(UNFINISHED):
        raise UserError(
            f"{flag} {folder}: what is in this folder was not completed: name the one without the "
            f"dot and {UNFINISHED}, or write it again"
        )


def folder_name(iteration: int | str) -> str:
    """The name of an iteration's folder; `release` stands for a checkpoint without a number."""
    return "release" if iteration == "release" else f"iter_{int(iteration):07d}"


def read_tracker(folder: Path) -> int | Literal["release"]:
    """The iteration that the tracker names; UserError, with what was found, for anything else."""
    try:
        with (folder / TRACKER).open(errors="replace") as file:
            word = file.read(100).strip()
    except OSError as error:
        raise UserError(f"{TRACKER} cannot be read ({error.strerror})") from None
    if word == "release":
        return "release"
    if re.fullmatch(r"[0-9]{1,12}", word) is None:
        raise UserError(f"{TRACKER} says {word!r}, which is no number of an iteration")
    return int(word)


def read_iteration(folder: Path) -> str:
    """The name of the iteration folder that the tracker names."""
    return folder_name(read_tracker(folder))


def iterations(folder: Path) -> list[int]:
    """Numbers of the iteration folders in `folder`, complete or not, in order."""
    found = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in folder.glob("iter_*"))
    return sorted(int(match[1]) for match in found if match)


def missing(iteration: Path) -> str | None:
    """What an iteration's folder lacks, by names and sizes of its files; None if it is whole.

    Untrusted if its index asks for code or for files elsewhere.
    """
    from swiftmeg.unpickling import INDEX, read_index

    try:
        json.loads((iteration / LAST_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return f"{iteration.name} is missing or incomplete"
    try:
        index = read_index(iteration / INDEX)
    except Untrusted:
        raise
    except UserError as error:
        return str(error)
    ends: dict[str, int] = {}
    for entry in index.storage_data.values():
        file = entry.relative_path
        ends[file] = max(ends.get(file, 0), entry.offset + entry.length)
    for file, end in sorted(ends.items()):
        path = iteration / file
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) < end:
            return f"{path} is cut short: it has {size} of {end} bytes"
    return None


def damaged(iteration: Path, share: int = 0, shares: int = 1) -> str | None:
    """Which file's content is not what was written; None if all is well.

    Reads every `shares`-th entry from the `share`-th on, so that the ranks of a job can divide the
    work. The iteration must be whole by `missing`. Untrusted if what is no tensor asks for code.
    """
    from swiftmeg.unpickling import INDEX, is_item, load_item, read_index

    index = read_index(iteration / INDEX)
    entries = sorted(
        index.storage_data.items(), key=lambda each: (each[1].relative_path, each[1].offset)
    )
    for key, place in entries[share::shares]:
        try:
            content = read_entry(iteration, place)
            if is_item(index, key):
                load_item(content, iteration / place.relative_path)
        except Untrusted:
            raise
        except UserError as error:
            return str(error)
    return None


def read_common_state(iteration: Path) -> dict[str, Any]:
    """What an iteration says of the run that wrote it: its arguments, `args`, and more.

    Untrusted if it asks for code; UserError, naming the file, if it is damaged.
    """
    from swiftmeg.unpickling import COMMON, INDEX, load_item, read_index

    said = read_object(iteration / LAST_FILE)
    if said.get("sharded_backend") != FORMAT:
        raise UserError(
            f"{iteration / LAST_FILE} says {said.get('sharded_backend')!r} of the checkpoint's "
            f"format: {FORMAT} is read"
        )
    legacy = iteration / COMMON
    if legacy.is_file():
        path, state = legacy, load_item(io.BytesIO(legacy.read_bytes()), legacy)
    else:
        places = {
            key.fqn: place for key, place in read_index(iteration / INDEX).storage_data.items()
        }
        if _COMMON_STATE not in places:
            raise UserError(f"{iteration} does not say with which arguments it was written")
        path = iteration / places[_COMMON_STATE].relative_path
        items = load_item(read_entry(iteration, places[_COMMON_STATE]), path)
        state = items[0] if isinstance(items, list) and len(items) == 1 else None
    if not isinstance(state, dict):
        raise UserError(f"{path} does not say with which arguments the checkpoint was written")
    return state


def read_entry(iteration: Path, entry: Any) -> io.BytesIO:
    """One entry of the index, read once and checked; UserError, naming the file, if it is damaged.

    `entry` has relative_path, offset and length (bytes).
    """
    path = iteration / entry.relative_path
    with path.open("rb") as file:
        file.seek(entry.offset)
        content = io.BytesIO(file.read(entry.length))
    try:
        with zipfile.ZipFile(content) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError):
        bad = "its index"
    if bad is not None:
        end = entry.offset + entry.length
        raise UserError(f"{path} is damaged: bytes {entry.offset} to {end}")
    content.seek(0)
    return content


def latest_whole(folder: Path, below: int | None = None) -> int | None:
    """The highest iteration that is whole, and under `below` if that is given."""
    for number in reversed(iterations(folder)):
        if (below is None or number < below) and missing(folder / folder_name(number)) is None:
            return number
    return None


def check_checkpoint(flag: str, folder: str) -> Path:
    """The folder of a Megatron checkpoint; UserError unless the iteration it names is whole."""
    path, fault, _ = examine(flag, folder)
    if fault is not None:
        raise UserError(f"{flag} {folder}: {fault}: {_remedy(path)}")
    return path


def find_start(flag: str, folder: str, step: int | None) -> tuple[Path, int | None, str | None]:
    """The checkpoint to continue from: its folder, an iteration that is not the tracker's, a note.

    `step` asks for that iteration. If the tracker's is broken, the latest whole one before it takes
    its place, and the note says so. UserError if there is none.
    """
    path, fault, tracked = examine(flag, folder, step)
    if fault is None:
        return path, step, None
    return path, *fall_back(flag, folder, tracked, fault, asked=step is not None)


def fall_back(
    flag: str, folder: str, broken: int | None, fault: str, *, asked: bool = False
) -> tuple[int, str]:
    """The whole iteration before `broken` and a note; UserError if there is none or it is asked."""
    path = Path(folder).expanduser().resolve()
    number = None if asked else latest_whole(path, broken)
    if number is None:
        raise UserError(f"{flag} {folder}: {fault}: {_remedy(path)}")
    return number, f"{flag} {folder}: {fault}: continuing from {folder_name(number)} instead"


def examine(flag: str, folder: str, step: int | None = None) -> tuple[Path, str | None, int | None]:
    """The folder, what is wrong with the iteration it names, and that iteration's number."""
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    refuse_unfinished(flag, path)
    tracker = path / TRACKER
    if not tracker.is_file():
        if path.name.startswith("iter_"):
            raise UserError(f"{flag} {folder}: give its parent folder, {path.parent}")
        if not iterations(path) and not (path / folder_name("release")).is_dir():
            raise UserError(f"{flag} {folder}: not a Megatron checkpoint, {TRACKER} is missing")
    if step is not None:
        return path, missing(path / folder_name(step)), step
    if not tracker.is_file():
        return path, f"{TRACKER} is missing", None
    try:
        word = read_tracker(path)
    except UserError as error:
        return path, str(error), None
    number = None if word == "release" else word
    fault = missing(path / folder_name(word))
    if fault is not None and "missing or incomplete" in fault:
        fault = f"{TRACKER} names {folder_name(word)}, which is missing or incomplete"
    return path, fault, number


def is_empty(folder: str) -> bool:
    """True where no run has completed a checkpoint yet."""
    path = Path(folder).expanduser().resolve()
    return not (path / TRACKER).is_file() and latest_whole(path) is None


def _remedy(path: Path) -> str:
    return (
        "copy the checkpoint again, or write the number of a complete iter_* folder into "
        f"{path / TRACKER}"
    )


def write_tracker(folder: Path, word: str) -> None:
    """Name the latest iteration, in one step: a reader sees the old word or the new one."""
    part = folder / f".{TRACKER}.part"
    with part.open("w") as file:
        file.write(word)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / TRACKER)


def make_room(folder: Path, iteration: int) -> None:
    """Remove what is left of an earlier `iteration`, before it is written again.

    The tracker is turned away from it first: at no moment does it name something half removed.
    """
    target = folder / folder_name(iteration)
    if not target.exists():
        return
    tracker = folder / TRACKER
    if tracker.is_file() and tracker.read_text(errors="replace").strip() == str(iteration):
        previous = latest_whole(folder, iteration)
        if previous is None:
            tracker.unlink()
        else:
            write_tracker(folder, str(previous))
    remove(target)


def remove(target: Path) -> None:
    """Delete an iteration, its last file first, so that half of it never counts."""
    (target / LAST_FILE).unlink(missing_ok=True)
    shutil.rmtree(target)


def surplus(folder: Path, latest: int, limit: int) -> Iterable[int]:
    """Iterations up to `latest` that are older than the `limit` newest complete ones."""
    complete = [
        number
        for number in iterations(folder)
        if number <= latest and (folder / folder_name(number) / LAST_FILE).is_file()
    ]
    return complete[:-limit]
