"""Tokenise rows once and keep the result in a folder that all processes share."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from swiftmeg.cache import cache_root, content_key, get_or_build
from swiftmeg.data.encoded.tokens import (
    Array,
    EncodedChunk,
    PairDataset,
    TokenDataset,
    TokenWriter,
    encoded_chunk,
)
from swiftmeg.data.parallel import map_chunks
from swiftmeg.data.standard_row import Drops, RowTooLong, plain_rows
from swiftmeg.data.template.pairs import Pair, PairTemplate
from swiftmeg.data.template.template import UNSHOWN_REASONING, Encoded, Template
from swiftmeg.errors import UserError

logger = logging.getLogger(__name__)

_FORMAT = 5  # raise it when the same row would be encoded otherwise than before
_CHUNK = 500
_HASHED = 10_000
_LARGE = 64 * 2**20  # bytes
_PROGRESS_SECONDS = 30

_Outcome = tuple[EncodedChunk, Drops, Counter[str]]


def encode_rows(
    rows: Dataset,
    template: Template,
    *,
    num_proc: int = 1,
    strict: bool = False,
    cache_dir: str | None = None,
) -> TokenDataset:
    """Return the dataset of `input_ids`, `labels` and `length` of standard rows, kept on disk.

    Row order is kept, although the rows are read in the order in which they are stored, and those
    that are there more than once are encoded once. A row that the template cannot use is dropped,
    counted and reported, or, with `strict`, the first in stored order raises UserError; rows over
    `max_length` under the strategy `delete` are dropped either way.

    The result lies in `cache_dir` (default `$SWIFTMEG_CACHE/encoded`) under a hash of the rows and
    everything in the template that matters; any number of processes may ask for it at the same
    time, and one of them does the work. Raises UserError if no row is left.
    """
    folder, order = _encoded_folder(rows, template, num_proc, strict, cache_dir)
    encoded = TokenDataset(folder)
    return encoded if order is None else TokenDataset(folder, _places(encoded.rows(), order))


def check_rows(rows: Dataset, template: Template | PairTemplate, num_proc: int = 1) -> None:
    """UserError for the first row that no run could use, such as one of an unknown token."""
    rows, _ = in_stored_order(rows)

    def work(start: int) -> None:
        _encode_chunk(rows, template, start, False)

    for _ in _progress(_pass(rows, work, _CHUNK, num_proc), len(rows)):
        pass


def encode_pairs(
    rows: Dataset,
    template: PairTemplate,
    *,
    num_proc: int = 1,
    strict: bool = False,
    cache_dir: str | None = None,
) -> PairDataset:
    """The same for preference pairs, whose sides are two stored rows with one number."""
    folder, order = _encoded_folder(rows, template, num_proc, strict, cache_dir)
    sides = TokenDataset(folder)
    if order is not None:
        first = 2 * _places(sides.rows()[::2], order)
        sides = TokenDataset(folder, np.stack([first, first + 1], axis=1).reshape(-1))
    return PairDataset(sides)


def _encoded_folder(
    rows: Dataset,
    template: Template | PairTemplate,
    num_proc: int,
    strict: bool,
    cache_dir: str | None,
) -> tuple[Path, Array | None]:
    """Return the folder of the encoded rows, and the order of `rows` among those as stored."""
    rows, order = in_stored_order(rows)
    root = Path(cache_dir) if cache_dir else cache_root() / "encoded"
    key = content_key([_FORMAT, rows_fingerprint(rows, num_proc), template.identity()])
    folder = get_or_build(
        root / key, lambda temporary: _write(rows, template, num_proc, strict, temporary)
    )
    account = json.loads((folder / "account.json").read_text(encoding="utf-8"))
    drops = Drops.from_json(account["drops"])
    if strict and account.get("bad_rows"):
        raise UserError(f"--strict true: {account['bad_rows']} rows cannot be used: {drops}")
    kept = len(rows) - drops.total
    logger.info("%s (%s)", _summary(len(rows), kept, drops, account), folder)
    if kept == 0:
        raise UserError(f"no row is left after tokenisation: of {len(rows)} rows, {drops}")
    return folder, order


def in_stored_order(rows: Dataset) -> tuple[Dataset, Array | None]:
    """Return the distinct rows of a selection in the order in which they are stored.

    With them come, for each row of the selection (int64 [rows]), its place among these; None where
    the rows are in that order already.
    """
    if rows._indices is None:
        return rows, None
    stored = rows._indices.column(0).to_numpy()
    wanted = np.zeros(len(rows.data), dtype=bool)
    wanted[stored] = True
    order = (np.cumsum(wanted, dtype=_index_type(len(wanted))) - 1)[stored]
    all_stored = Dataset(rows.data, info=rows.info)
    if wanted.all():
        return all_stored, order
    return all_stored.select(np.flatnonzero(wanted), keep_in_memory=True), order


def _places(kept: Array, order: Array) -> Array:
    """Return where among the rows that were `kept` those of `order` are, without the others."""
    places = np.searchsorted(kept, order).astype(_index_type(len(kept)))
    np.minimum(places, len(kept) - 1, out=places)
    return places[kept[places] == order]


def _index_type(count: int) -> type[np.signedinteger[Any]]:
    """What holds indices of `count` rows: every rank keeps some for each row."""
    return np.int32 if count < 2**31 else np.int64


def rows_fingerprint(rows: Dataset, num_proc: int = 1) -> str:
    """Return a hash of the rows' content, without the column that says where they came from."""
    columns = sorted(set(rows.column_names) - {"origin"})
    content = rows.select_columns(columns).with_format("arrow")

    def digest(start: int) -> bytes:
        table = content[start : start + _HASHED].select(columns)
        table = table.replace_schema_metadata().combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return hashlib.sha256(sink.getvalue()).digest()

    whole = hashlib.sha256()
    for part in _pass(rows, digest, _HASHED, num_proc):
        whole.update(part)
    return whole.hexdigest()


def _pass[Result](
    rows: Dataset, work: Callable[[int], Result], chunk: int, num_proc: int
) -> Iterator[Result]:
    """Yield `work(start)` for each chunk of the rows, in order.

    Of many rows, this process reads none: pages of mapped files that it has touched would count as
    its memory.
    """
    starts = range(0, len(rows), chunk)
    mapped = sum(Path(file["filename"]).stat().st_size for file in rows.cache_files)
    return map_chunks(work, starts, min(num_proc, len(starts)), in_process=mapped <= _LARGE)


def _write(
    rows: Dataset, template: Template | PairTemplate, num_proc: int, strict: bool, folder: Path
) -> None:
    def work(start: int) -> _Outcome:
        return _encode_chunk(rows, template, start, strict)

    drops, counts = Drops(), Counter[str]()
    results = _pass(rows, work, _CHUNK, num_proc)
    with TokenWriter(folder, weighted=template.weighted) as writer:
        for chunk, dropped, counted in _progress(results, len(rows)):
            writer.write(chunk)
            drops.merge(dropped)
            counts.update(counted)
    account = {"drops": drops.to_json(), **counts}
    (folder / "account.json").write_text(json.dumps(account), encoding="utf-8")


def _encode_chunk(
    rows: Dataset, template: Template | PairTemplate, start: int, strict: bool
) -> _Outcome:
    """Encode up to `_CHUNK` rows; return them, the drops, and how many of those are bad rows (not
    merely too long), with the template's own counts."""
    drops, counts, before = Drops(), Counter[str](), Counter(template.counts)
    kept: list[Encoded] = []
    indices: list[int] = []
    chunk = plain_rows(rows.with_format("arrow")[start : start + _CHUNK])
    for index, outcome in enumerate(template.encode_many(chunk)):
        if isinstance(outcome, Encoded | Pair):
            sides = [outcome] if isinstance(outcome, Encoded) else list(outcome)
            kept += sides
            indices += [start + index] * len(sides)
            continue
        origin = chunk[index].get("origin") or f"row {start + index + 1}"
        if isinstance(outcome, UserError):
            raise UserError(f"{origin}: {outcome}")
        too_long = isinstance(outcome, RowTooLong)
        if strict and not too_long:
            raise UserError(f"--strict true: {origin}: {outcome}")
        drops.add(origin, outcome)
        counts["bad_rows"] += not too_long
    return encoded_chunk(kept, indices), drops, counts + (template.counts - before)


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
    if account.get("context_only_turns"):
        text += (
            f"; {account['context_only_turns']} earlier assistant turns are context only, because "
            "the chat template strips their thinking"
        )
    if account.get("unshown_reasoning"):
        text += f"; {UNSHOWN_REASONING % account['unshown_reasoning']}"
    return text
