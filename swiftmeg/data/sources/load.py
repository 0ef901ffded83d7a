"""Load datasets as rows in standard form.

Per dataset: load, bring into standard form, split off validation rows, sample `#N`. Then the
datasets are concatenated or interleaved, and the training rows shuffled.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets, interleave_datasets

from swiftmeg.cache import cache_root, content_key, get_or_build
from swiftmeg.data.parallel import map_chunks
from swiftmeg.data.sources.dataset_spec import Source
from swiftmeg.data.sources.formats import Identity
from swiftmeg.data.sources.hubs import DOWNLOAD_MODES
from swiftmeg.data.sources.readers import chunks
from swiftmeg.data.sources.subset_reader import OriginRow, ReadOptions, SubsetReader, open_dataset
from swiftmeg.data.standard_row import ROW_SCHEMA, Drops, Row, RowError, to_columns
from swiftmeg.errors import UserError

logger = logging.getLogger(__name__)

STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted")

_FORMAT = 3  # raise it when the same file would give other rows than before
_CHUNK = 1000

MOST_REPEATED = 10**8
"""The largest N of `#N` for a set of fewer rows."""

# Temporary folders of rows that must not be taken from the cache; they vanish with the process.
_uncached: list[tempfile.TemporaryDirectory[str]] = []


def load_rows(
    specs: list[str],
    *,
    data_seed: int = 42,
    dataset_num_proc: int = 1,
    columns: dict[str, str] | None = None,
    strict: bool = False,
    split_dataset_ratio: float = 0.0,
    dataset_shuffle: bool = True,
    interleave_prob: list[float] | None = None,
    stopping_strategy: str = "first_exhausted",
    model_name: list[str] | None = None,
    model_author: list[str] | None = None,
    use_hf: bool = False,
    hub_token: str | None = None,
    download_mode: str = "reuse_dataset_if_exists",
    load_from_cache_file: bool = True,
    for_training: bool = True,
) -> tuple[Dataset, Dataset | None]:
    """Return the training rows and, with `split_dataset_ratio`, the validation rows split off.

    `specs` follow `[hf::|ms::]id_or_path[:subset1/subset2][#N]`. The columns are those of
    `rows.ROW_SCHEMA`, but for those that no row uses: always `messages` and `origin`. A row that
    cannot be used is dropped and reported in the log, or raises UserError with `strict`.
    With `for_training` a row must end with the assistant's turn.
    Everything random depends on `data_seed`. Many processes may load the same data at once.

    Raises UserError for whatever is wrong with the flags or the data.
    """
    check_mixing(specs, interleave_prob, stopping_strategy, download_mode)
    if not 0 <= split_dataset_ratio < 1:
        raise UserError(
            f"--split_dataset_ratio {split_dataset_ratio}: accepted: from 0 to less than 1"
        )
    options = ReadOptions(
        columns=columns or {},
        identity=identity(model_name, model_author),
        data_seed=data_seed,
        num_proc=dataset_num_proc,
        strict=strict,
        hub_token=hub_token,
        download_mode=download_mode,
        cached=load_from_cache_file,
        for_training=for_training,
    )
    train_parts: list[Dataset] = []
    val_parts: list[Dataset] = []
    for index, spec in enumerate(specs):
        source, readers = open_dataset(spec, use_hf, options)
        rows = concatenate_datasets([_load_subset(reader) for reader in readers])
        chooser = np.random.default_rng([data_seed, index])
        train, val = _split_and_sample(rows, source, split_dataset_ratio, chooser)
        train_parts.append(train)
        if val is not None:
            val_parts.append(val)
    if interleave_prob is None:
        train = concatenate_datasets(train_parts)
    else:
        train = interleave_datasets(
            train_parts,
            probabilities=interleave_prob,
            seed=data_seed,
            stopping_strategy=stopping_strategy,
        )
    if dataset_shuffle:
        train = train.shuffle(seed=data_seed, keep_in_memory=True)
    val = concatenate_datasets(val_parts) if val_parts else None
    unused = _unused_columns([*train_parts, *val_parts])
    logger.info("%d training rows, %d validation rows", len(train), len(val) if val else 0)
    return train.remove_columns(unused), val.remove_columns(unused) if val else None


def identity(model_name: list[str] | None, model_author: list[str] | None) -> Identity:
    """What --model_name and --model_author say; raises UserError for more than two values."""
    return Identity(
        tuple(model_name) if model_name else None, tuple(model_author) if model_author else None
    )


def check_mixing(
    specs: list[str],
    interleave_prob: list[float] | None,
    stopping_strategy: str,
    download_mode: str,
) -> None:
    """UserError for what is wrong with the datasets' flags before any of them is looked at."""
    if not specs:
        raise UserError("--dataset: give at least one dataset (a file, a folder, or a hub id)")
    if interleave_prob is not None:
        given = " ".join(map(str, interleave_prob))
        if len(interleave_prob) != len(specs):
            raise UserError(
                f"--interleave_prob {given}: {len(interleave_prob)} values for {len(specs)} "
                "datasets: give one for each"
            )
        if min(interleave_prob) < 0 or abs(sum(interleave_prob) - 1) > 1e-6:
            raise UserError(f"--interleave_prob {given}: must be positive and sum up to 1")
    for flag, value, accepted in (
        ("--stopping_strategy", stopping_strategy, STOPPING_STRATEGIES),
        ("--download_mode", download_mode, DOWNLOAD_MODES),
    ):
        if value not in accepted:
            raise UserError(f"{flag} {value}: unknown; accepted: {', '.join(accepted)}")


def _load_subset(reader: SubsetReader) -> Dataset:
    """Return all usable rows of one subset, memory-mapped from the cache."""
    options, label = reader.options, reader.label

    def build(folder: Path) -> None:
        work = partial(_standardise, reader)
        _write(map_chunks(work, chunks(reader.raw(), _CHUNK), options.num_proc), folder)

    if options.cached:
        key = content_key([_FORMAT, *reader.describe()])
        folder = get_or_build(cache_root() / "rows" / key, build)
    else:
        _uncached.append(tempfile.TemporaryDirectory(prefix="swiftmeg-rows-"))
        folder = Path(_uncached[-1].name)
        build(folder)
    rows = Dataset.from_file(str(folder / "data.arrow"))
    drops = Drops.from_json(json.loads((folder / "account.json").read_text(encoding="utf-8")))
    if options.strict and drops.total:
        raise UserError(f"--strict true: --dataset {label}: unusable rows: {drops}")
    logger.info(
        "%s: %d rows read, %d kept, %d dropped%s",
        *(label, len(rows) + drops.total, len(rows), drops.total),
        f": {drops}" if drops.total else "",
    )
    if drops.unread:
        logger.warning("%s: %s", label, drops.unread_keys())
    if len(rows) == 0:
        reason = f"none of its {drops.total} rows can be used: {drops}" if drops.total else "empty"
        raise UserError(f"--dataset {label}: {reason}")
    return rows


def _standardise(reader: SubsetReader, chunk: list[OriginRow]) -> tuple[pa.RecordBatch, Drops]:
    standard: list[Row] = []
    drops = Drops(unread=reader.unread)
    reader.unread.clear()
    for row in chunk:
        try:
            standard.append(to_columns(reader.standard(row)))
        except RowError as error:
            drops.add(f"{row[0]}:{row[1][0]}", error)
    return pa.RecordBatch.from_pylist(standard, schema=ROW_SCHEMA), drops


def _write(batches: Iterator[tuple[pa.RecordBatch, Drops]], folder: Path) -> None:
    drops = Drops()
    with (
        pa.OSFile(str(folder / "data.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, ROW_SCHEMA) as writer,
    ):
        for batch, dropped in batches:
            writer.write_batch(batch)
            drops.merge(dropped)
    (folder / "account.json").write_text(json.dumps(drops.to_json()), encoding="utf-8")


def _split_and_sample(
    rows: Dataset, source: Source, ratio: float, chooser: np.random.Generator
) -> tuple[Dataset, Dataset | None]:
    """Split validation rows off, then take `#N` rows, validation rows included in the N."""
    wanted = source.sample
    if not ratio:
        if wanted is None:
            return rows, None
        return _select(rows, _sample(np.arange(len(rows)), source, wanted, chooser)), None
    available = len(rows) if wanted is None else min(len(rows), wanted)
    held_out = max(int(available * ratio), 1)
    if available <= held_out:
        raise UserError(
            f"--dataset {source.spec}: {available} row(s) cannot be split with "
            f"--split_dataset_ratio {ratio}: nothing is left to train on"
        )
    order = chooser.permutation(len(rows))
    train = np.sort(order[held_out:])
    if wanted is not None:
        train = _sample(train, source, wanted - held_out, chooser)
    return _select(rows, train), _select(rows, np.sort(order[:held_out]))


def _sample(
    indices: np.ndarray, source: Source, wanted: int, chooser: np.random.Generator
) -> np.ndarray:
    """Take `wanted` of the indices: whole copies first, then a random part without repetition."""
    copies, remainder = divmod(wanted, len(indices))
    if copies and wanted > len(indices):
        if wanted > MOST_REPEATED:
            raise UserError(
                f"--dataset {source.spec}: the set has {len(indices)} rows, and repeats of them "
                f"make at most {MOST_REPEATED:,}: lower N"
            )
        logger.warning(
            "%s: there are %d rows for %d: each is taken %d times%s",
            *(source.spec, len(indices), wanted, copies),
            f", and {remainder} of them, drawn at random, once more" if remainder else "",
        )
    part = chooser.permutation(indices)[:remainder]
    return np.concatenate([np.tile(indices, copies), part]).astype(np.int64)


def _select(rows: Dataset, indices: np.ndarray) -> Dataset:
    return rows.select(indices, keep_in_memory=True)


def _unused_columns(parts: list[Dataset]) -> list[str]:
    optional = set(ROW_SCHEMA.names) - {"messages", "origin"}
    return sorted(
        name
        for name in optional
        if all(part.data.column(name).null_count == len(part.data) for part in parts)
    )
