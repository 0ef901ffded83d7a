"""Read local files as raw rows with the line or row number of each.

Files are read row by row rather than through a table, because rows of one file need not have the
same columns, and because a bad row is to be named by its line.
"""

import codecs
import csv
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from swiftmeg.data.sources.arrow_rows import batch_rows
from swiftmeg.data.sources.text_files import COMPRESSED, open_bytes
from swiftmeg.data.standard_row import Row, RowError, not_utf8
from swiftmeg.errors import UserError

_TEXT = (".jsonl", ".json", ".csv", ".txt")
_TABLES = (".parquet", ".arrow")
EXTENSIONS = (*_TEXT, *_TABLES, *(kind + packed for kind in _TEXT for packed in COMPRESSED))

RawRow = tuple[int, bytes | Row | RowError]
"""Line or row number, counted from 1, and the row: for JSON lines still bytes, and an error where
the file holds something else than a row."""

LINE_LIMIT = 32 * 2**20
"""Bytes of the longest line that is read: about eight million tokens."""

_ARROW_FILE = b"ARROW1"

# Files that describe a dataset and often lie beside it.
_METADATA = {
    *("dataset_dict.json", "dataset_info.json", "dataset_infos.json"),
    *("config.json", "state.json"),
}
_SCRATCH = "cache-"  # results that the library datasets keeps beside what it has saved
_SPACE = re.compile(r"[ \t\n\r]*")
_CHUNK_BYTES = 8 * 2**20
_TRAIN = re.compile(r"(^|[-_.])train([-_.]|$)")


def data_files(path: Path, spec: str) -> list[Path]:
    """Return the data files that `path`, a file or a folder, stands for, in order of name.

    Of a folder, those directly in it are taken, else those at any depth; where some are named
    after a training split, only these. Raises UserError if there is none, or for a file of
    another kind.
    """
    if path.is_file():
        if not path.name.lower().endswith(EXTENSIONS):
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
            if file.is_file()
            and file.name.lower().endswith(EXTENSIONS)
            and file.name not in _METADATA
            and not file.name.startswith(_SCRATCH)
        )
        if files:
            break
    if not files:
        raise UserError(
            f"--dataset {spec}: no data file in the folder {path}; looked for "
            f"{', '.join(EXTENSIONS)}"
        )
    return [file for file in files if _for_training(file.relative_to(path))] or files


def _for_training(file: Path) -> bool:
    """Whether a file, or a folder that it is in, is named after a training split."""
    return any(_TRAIN.search(name) for name in (*file.parent.parts, file.stem))


def read_raw(path: Path) -> Iterator[RawRow]:
    """Yield the raw rows of a file by its extension; blank lines are skipped.

    Raises UserError, naming file and line, where the file is damaged in a way that leaves it open
    where the next row begins.
    """
    read = {
        ".jsonl": _lines,
        ".json": _json,
        ".csv": _csv,
        ".txt": _txt,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    kinds = [suffix for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    try:
        yield from read[kinds[-1].lower()](path)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def parse_raw(row: bytes | Row | RowError) -> Row:
    """Return a raw row as a dict; raises RowError if it is no JSON object."""
    if isinstance(row, RowError):
        raise row
    if isinstance(row, dict):
        return row
    try:
        value = json.loads(row.decode("utf-8"), object_pairs_hook=strict_object)
    except UnicodeDecodeError as error:
        raise not_utf8(error) from None
    except RecursionError:
        raise RowError("nested too deeply") from None
    except ValueError as error:  # also for numbers of thousands of digits
        raise RowError("not JSON", str(error)) from None
    return _row(value)


def chunks(items: Iterable[tuple[str, RawRow]], rows: int) -> Iterator[list[tuple[str, RawRow]]]:
    """Yield lists of up to `rows` items, fewer where they are long."""
    chunk: list[tuple[str, RawRow]] = []
    size = 0
    for item in items:
        chunk.append(item)
        raw = item[1][1]
        size += len(raw) if isinstance(raw, bytes) else 0
        if len(chunk) == rows or size > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def strict_object(pairs: list[tuple[str, Any]]) -> Row:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise RowError("a key is given twice", counts.most_common(1)[0][0])
    return value


def _row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise RowError("not a JSON object", type(value).__name__)
    return value


def _lines(path: Path) -> Iterator[tuple[int, bytes | RowError]]:
    # Only a line feed ends a line; a carriage return within it is text.
    with open_bytes(path) as file:
        if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        for number in itertools.count(1):
            line = file.readline(LINE_LIMIT)
            if not line:
                return
            if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(LINE_LIMIT)
                yield number, RowError(f"longer than {LINE_LIMIT // 2**20} MiB")
            elif not line.isspace():
                yield number, line


def _json(path: Path) -> Iterator[RawRow]:
    """The elements of an array, or the lines of a file that holds none."""
    with open_bytes(path) as file:
        lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)
        start = next((line for line in lines if line), b"")
    if not start.startswith(b"["):
        yield from _lines(path)
        return
    try:
        with open_bytes(path) as file:
            text = file.read().decode("utf-8-sig")
        yield from enumerate(_elements(text), 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}): convert the file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: is not JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None


def _elements(text: str) -> Iterator[Row | RowError]:
    """The rows of a JSON array one by one."""
    strict, lax = json.JSONDecoder(object_pairs_hook=strict_object), json.JSONDecoder()
    at = _after(text, text.index("["), "[")
    if text[at : at + 1] == "]":
        return
    while True:
        try:
            value, end = strict.raw_decode(text, at)
            row = _row(value)
        except RowError as error:
            yield error
            end = lax.raw_decode(text, at)[1]
        else:
            yield row
        at = _after(text, end, "")
        if text[at : at + 1] == "]":
            break
        at = _after(text, at, ",")
    if _after(text, at, "]") < len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)


def _after(text: str, at: int, word: str) -> int:
    """The place behind `word`, which must stand at `at`, and the white space that follows it."""
    if not text.startswith(word, at):
        raise json.JSONDecodeError(f"Expecting {word!r}", text, at)
    found = _SPACE.match(text, at + len(word))
    assert found is not None
    return found.end()


def _csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(LINE_LIMIT)
    # Bytes that are not UTF-8 become surrogates, which no UTF-8 text holds: only their row is bad.
    with (
        open_bytes(path) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        reader = csv.DictReader(file, strict=True)
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{path}: is not CSV ({error}): a quote that opens in the row of line {start} "
                    'may not be closed; write "" for a quote in a quoted field'
                ) from None
            if row is None:
                return
            yield reader.line_num, _csv_row(row)


def _csv_row(row: dict[Any, Any]) -> Row | RowError:
    if None in row:
        return RowError("more fields than the header", "quote fields that hold commas")
    try:
        "".join(value or "" for value in row.values()).encode("utf-8")
    except UnicodeEncodeError:
        return RowError("not UTF-8")
    return row


def _txt(path: Path) -> Iterator[RawRow]:
    for number, line in _lines(path):
        if isinstance(line, RowError):
            yield number, line
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, not_utf8(error)
        else:
            yield number, {"text": text.rstrip("\r\n")}


def _parquet(path: Path) -> Iterator[RawRow]:
    with pq.ParquetFile(path) as file:
        yield from _numbered(file.iter_batches(batch_size=1000))


def _arrow(path: Path) -> Iterator[RawRow]:
    """The rows of an IPC stream, as datasets saves them, or an IPC file."""
    with pa.memory_map(str(path)) as file:
        whole = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        if whole:
            table = pa.ipc.open_file(file)
            yield from _numbered(map(table.get_batch, range(table.num_record_batches)))
        else:
            yield from _numbered(pa.ipc.open_stream(file))


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[RawRow]:
    return enumerate((row for batch in batches for row in batch_rows(batch)), 1)
