"""Tokenise rows once and keep the result in a folder that all processes share."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from swiftmeg.data.parallel import map_chunks
from swiftmeg.data.rows import Drops, RowError, RowTooLong
from swiftmeg.data.store import cache_root, content_key, get_or_build
from swiftmeg.data.template import Template
from swiftmeg.errors import UserError

logger = logging.getLogger(__name__)

_FORMAT = 2  # raise it when the same row would be encoded otherwise than before
_CHUNK = 500
_PROGRESS_SECONDS = 30
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("row", pa.int64()),
    ]
)


def encode_rows(
    rows: Dataset,
    template: Template,
    *,
    num_proc: int = 1,
    strict: bool = False,
    cache_dir: str | None = None,
) -> Dataset:
    """Return the memory-mapped dataset of `input_ids`, `labels` and `length` of standard rows.

    Row order is kept, although the rows are read in the order in which they are stored, and those
    that are there more than once are encoded once. A row that the template cannot use is dropped,
    counted and reported, or, with `strict`, the first in stored order raises UserError; rows over
    `max_length` under the strategy `delete` are dropped either way.

    The result lies in `cache_dir` (default `$SWIFTMEG_CACHE/encoded`) under a hash of the rows and
    everything in the template that matters; any number of processes may ask for it at the same
    time, and one of them does the work. Raises UserError if no row is left.
    """
    rows, order = in_stored_order(rows)
    root = Path(cache_dir) if cache_dir else cache_root() / "encoded"
    key = content_key([_FORMAT, rows_fingerprint(rows), template.identity()])
    folder = get_or_build(
        root / key, lambda temporary: _write(rows, template, num_proc, strict, temporary)
    )
    account = json.loads((folder / "account.json").read_text(encoding="utf-8"))
    drops = Drops.from_json(account["drops"])
    if strict and account["bad_rows"]:
        raise UserError(f"--strict true: {account['bad_rows']} rows cannot be used: {drops}")
    encoded = Dataset.from_file(str(folder / "data.arrow"))
    logger.info("%s (%s)", _summary(len(rows), len(encoded), drops, account), folder)
    if len(encoded) == 0:
        raise UserError(f"no row is left after tokenisation: of {len(rows)} rows, {drops}")
    return _in_order(encoded, order)


def in_stored_order(rows: Dataset) -> tuple[Dataset, np.ndarray[Any, Any] | None]:
    """Return the distinct rows of a selection in the order in which they are stored.

    With them come, for each row of the selection (int64 [rows]), its place among these; None where
    the rows are in that order already.
    """
    if rows._indices is None:
        return rows, None
    stored = rows._indices.column(0).to_numpy()
    _, first, order = np.unique(stored, return_index=True, return_inverse=True)
    return rows.select(first, keep_in_memory=True), order


def _in_order(encoded: Dataset, order: np.ndarray[Any, Any] | None) -> Dataset:
    """Put the rows that were kept in `order`, and leave out the column with their places."""
    kept = encoded.data.column("row").to_numpy()
    encoded = encoded.remove_columns("row")
    if order is None:
        return encoded
    places = np.minimum(np.searchsorted(kept, order), len(kept) - 1)
    return encoded.select(places[kept[places] == order], keep_in_memory=True)


def rows_fingerprint(rows: Dataset) -> str:
    """Return a hash of the rows' content, without the column that says where they came from."""
    digest = hashlib.sha256()
    columns = sorted(set(rows.column_names) - {"origin"})
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        table = table.select(columns).replace_schema_metadata().combine_chunks()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _write(rows: Dataset, template: Template, num_proc: int, strict: bool, folder: Path) -> None:
    starts = range(0, len(rows), _CHUNK)

    def work(start: int) -> tuple[pa.RecordBatch, Drops, int, int]:
        return _encode_chunk(rows, template, start, strict)

    drops, bad_rows, context_only = Drops(), 0, 0
    results = map_chunks(work, starts, min(num_proc, len(starts)))
    with (
        pa.OSFile(str(folder / "data.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
    ):
        for batch, dropped, bad, untrained in _progress(results, len(rows)):
            writer.write_batch(batch)
            drops.merge(dropped)
            bad_rows += bad
            context_only += untrained
    account = {"drops": drops.to_json(), "bad_rows": bad_rows, "context_only": context_only}
    (folder / "account.json").write_text(json.dumps(account), encoding="utf-8")


def _encode_chunk(
    rows: Dataset, template: Template, start: int, strict: bool
) -> tuple[pa.RecordBatch, Drops, int, int]:
    """Encode up to `_CHUNK` rows; return them, the drops, how many of those are bad rows (not
    merely too long) and how many assistant turns are context only."""
    drops, bad_rows, before = Drops(), 0, template.context_only_turns
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    stop = min(start + _CHUNK, len(rows))
    for index, row in enumerate(rows.select(range(start, stop)).to_list(), start):
        origin = row.get("origin") or f"row {index + 1}"
        try:
            encoded = template.encode(row)
        except RowError as error:
            too_long = isinstance(error, RowTooLong)
            if strict and not too_long:
                raise UserError(f"--strict true: {origin}: {error}") from None
            drops.add(origin, error)
            bad_rows += not too_long
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None
        else:
            columns["input_ids"].append(encoded["input_ids"])
            columns["labels"].append(encoded["labels"])
            columns["length"].append(len(encoded["input_ids"]))
            columns["row"].append(index)
    batch = pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)
    return batch, drops, bad_rows, template.context_only_turns - before


def _progress[Item](items: Iterator[Item], total: int) -> Iterator[Item]:
    said = time.monotonic()
    for count, item in enumerate(items, 1):
        if time.monotonic() - said > _PROGRESS_SECONDS:
            said = time.monotonic()
            logger.info("tokenised %d of %d rows", min(count * _CHUNK, total), total)
        yield item


def _summary(read: int, kept: int, drops: Drops, account: dict[str, Any]) -> str:
    text = f"tokenised {read} rows: {kept} kept, {drops.total} dropped"
    if drops.total:
        text += f": {drops}"
    if account["context_only"]:
        text += (
            f"; {account['context_only']} earlier assistant turns are context only, because the "
            "chat template strips their thinking"
        )
    return text
