"""Read local files as raw rows with the line or row number of each.

Files are read row by row rather than through a table, because rows of one file need not have the
same columns, and because a bad row is to be named by its line.
"""

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from swiftmeg.data.rows import Row
from swiftmeg.errors import UserError

EXTENSIONS = (".jsonl", ".json", ".csv", ".txt", ".parquet")

RawRow = tuple[int, str | Row]
"""Line or row number, counted from 1, and the row, which for JSON lines is still text."""

# Files that describe a dataset and often lie beside it.
_METADATA = {"dataset_info.json", "dataset_infos.json", "config.json", "state.json"}
_TRAIN = re.compile(r"(^|[-_.])train([-_.]|$)")


def data_files(path: Path, spec: str) -> list[Path]:
    """Return the data files that `path`, a file or a folder, stands for, in order of name.

    Of a folder, those directly in it are taken, else those at any depth; where some are named
    after a training split, only these. Raises UserError if there is none, or for a file of
    another kind.
    """
    if path.is_file():
        if path.suffix.lower() not in EXTENSIONS:
            raise UserError(
                f"--dataset {spec}: unknown extension {path.suffix or '(none)'}; accepted: "
                f"{', '.join(EXTENSIONS)}"
            )
        return [path]
    files: list[Path] = []
    for pattern in ("*", "**/*"):
        files = sorted(
            file
            for file in path.glob(pattern)
            if file.is_file() and file.suffix.lower() in EXTENSIONS and file.name not in _METADATA
        )
        if files:
            break
    if not files:
        raise UserError(
            f"--dataset {spec}: no data file in the folder {path}; looked for "
            f"{', '.join(EXTENSIONS)}"
        )
    return [file for file in files if _TRAIN.search(file.stem)] or files


def read_raw(path: Path) -> Iterator[RawRow]:
    """Yield the raw rows of a file by its extension; blank lines are skipped.

    Raises UserError, naming file and line, for what cannot be read.
    """
    read = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".txt": _txt, ".parquet": _parquet}
    try:
        yield from read[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}): convert the file") from None
    except csv.Error as error:
        raise UserError(f"{path}: is not CSV ({error})") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def parse_raw(path: Path | str, number: int, row: str | Row) -> Row:
    """Return a raw row as a dict; raises UserError if it is no JSON object."""
    if not isinstance(row, str):
        return row
    try:
        value = json.loads(row)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} line {number}: is not JSON ({error}): correct or delete the line"
        ) from None
    return _object(path, number, value)


def chunks[Item](items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _object(path: Path | str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(
            f"{path} line {number}: is a JSON {type(value).__name__}; each row must be an object"
        )
    return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Only a line feed ends a line; a carriage return within it is text.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _json(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig") as file:
        is_array = next((line for line in file if line.strip()), "").lstrip().startswith("[")
    if not is_array:
        yield from _lines(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: is not JSON ({error.msg})") from None
    for number, row in enumerate(rows, 1):
        yield number, _object(path, number, row)


def _csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path} line {reader.line_num}: has more fields than the header: quote fields "
                    "that hold commas"
                )
            yield reader.line_num, row


def _txt(path: Path) -> Iterator[RawRow]:
    for number, line in _lines(path):
        yield number, {"text": line.rstrip("\r\n")}


def _parquet(path: Path) -> Iterator[RawRow]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
