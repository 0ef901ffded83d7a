"""One subset of a dataset: its raw rows, and how each becomes a standard row."""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher

from swiftmeg.data.sources.arrow_rows import nested_types, without_filling
from swiftmeg.data.sources.dataset_spec import Source, parse_spec
from swiftmeg.data.sources.formats import Identity, rename_columns, standard_row
from swiftmeg.data.sources.hubs import load_from_hub
from swiftmeg.data.sources.readers import RawRow, data_files, parse_raw, read_raw
from swiftmeg.data.sources.registry import Subset
from swiftmeg.data.standard_row import Row, RowError
from swiftmeg.errors import UserError

logger = logging.getLogger(__name__)

HASHED_WHOLE = 2**30
"""Bytes of the largest file whose content is hashed as a whole."""
_SAMPLES, _SAMPLE = 1024, 2**16

OriginRow = tuple[str, RawRow]
"""The file or hub id that a raw row comes from, and the row."""


@dataclass(frozen=True)
class ReadOptions:
    """What the reading of every dataset depends on, as the command line says it."""

    columns: Mapping[str, str]
    identity: Identity
    data_seed: int
    num_proc: int
    strict: bool
    hub_token: str | None
    download_mode: str
    cached: bool
    for_training: bool
    streaming: bool = False


class SubsetReader:
    """Reads a subset of `source`. Making one finds its files, or reaches for the hub.

    Raises UserError if there are none, or the hub does not answer.
    """

    def __init__(self, source: Source, name: str, subset: Subset, options: ReadOptions) -> None:
        self.source = source
        self.options = options
        self.label = source.spec if len(source.subsets) == 1 else f"{source.spec}, subset {name}"
        self.unread: Counter[str] = Counter()
        """In how many messages so far nothing reads a key."""
        self._subset = subset
        self._columns = {**source.info.columns, **subset.columns, **options.columns}
        self._files: list[Path] = []
        self._hub_splits: list[Iterable[Row]] = []
        if source.path is not None:
            # A subset of a local folder is a subfolder; a registered file has no such thing.
            folder = source.path / (subset.hub_subset or "")
            self._files = data_files(folder, source.spec)
        else:
            assert source.dataset_id is not None
            self._hub_splits = [
                load_from_hub(
                    source.dataset_id,
                    subset.hub_subset,
                    split,
                    use_hf=source.use_hf,
                    token=options.hub_token,
                    mode=options.download_mode,
                    streaming=options.streaming,
                )
                for split in source.info.splits
            ]

    def describe(self) -> list[Any]:
        """All that the standard rows depend on, as JSON-able values."""
        identity = self.options.identity
        return [
            self._content,
            self._columns,
            [identity.names, identity.authors, self.options.data_seed],
            Hasher.hash(self._subset.preprocess),
            self.options.for_training,
        ]

    @cached_property
    def _content(self) -> list[Any]:
        if self._files:
            return [[str(file.resolve()), *_version(file)] for file in self._files]
        prints = [getattr(split, "_fingerprint", None) for split in self._hub_splits]
        return [self.source.dataset_id, *prints]

    def raw(self) -> Iterator[OriginRow]:
        """Yield the raw rows in the order of files and lines."""
        for file in self._files:
            for raw in read_raw(file):
                yield str(file), raw
        if not self._files:
            assert self.source.dataset_id is not None
            rows = chain.from_iterable(map(_hub_rows, self._hub_splits))
            for raw in enumerate(rows, 1):
                yield self.source.dataset_id, raw

    def standard(self, row: OriginRow) -> Row:
        """Return the standard row of a raw one, with its `origin`.

        Raises RowError if it cannot be used, and UserError, naming its place, with `strict`.
        """
        file, (number, raw) = row
        origin = f"{file}:{number}"
        try:
            values = rename_columns(parse_raw(raw), self._columns)
            if self._subset.preprocess is not None:
                values = _preprocess(self._subset, values)
            values = self.options.identity.fill(values)
            chooser = partial(random.Random, f"{self.options.data_seed} {origin}")
            unread = Counter[str]()
            standard = standard_row(values, chooser, self.options.for_training, unread)
        except RowError as error:
            if self.options.strict:
                raise UserError(f"--strict true: {origin}: {error}") from None
            raise
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None
        if self.options.streaming and (new := unread.keys() - self.unread.keys()):
            named = ", ".join(sorted(new))
            logger.warning("%s: keys of messages that are not read: %s", origin, named)
        self.unread.update(unread)
        return {**standard, "origin": origin}


def open_dataset(
    spec: str, use_hf: bool, options: ReadOptions
) -> tuple[Source, list[SubsetReader]]:
    """Return a dataset of the command line and a reader for each of its subsets."""
    source = parse_spec(spec, use_hf)
    return source, [SubsetReader(source, *subset, options) for subset in source.subsets]


def _hub_rows(split: Any) -> Iterator[Row]:
    """The rows of a split, without the keys that Arrow has filled in."""
    features = getattr(split, "features", None)
    types = nested_types(features.arrow_schema) if features else {}
    for row in split:
        yield without_filling(row, types)


def _version(file: Path) -> list[Any]:
    """What tells a file's content from another: a hash of it, of large ones of samples, with what
    the filesystem says."""
    try:
        status = file.stat()
        with file.open("rb") as content:
            if status.st_size <= HASHED_WHOLE:
                return [hashlib.file_digest(content, "sha256").hexdigest()]
            digest = hashlib.sha256()
            for place in range(0, status.st_size, max(status.st_size // _SAMPLES, 1)):
                content.seek(place)
                digest.update(content.read(_SAMPLE))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    return [status.st_size, status.st_mtime_ns, status.st_ino, digest.hexdigest()]


def _preprocess(subset: Subset, row: Row) -> Row:
    assert subset.preprocess is not None
    try:
        return subset.preprocess(row)
    except (KeyError, TypeError, ValueError) as error:
        raise RowError("the dataset's preprocessing failed", repr(error)) from None
