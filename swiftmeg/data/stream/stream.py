"""Rows that are read while training: one endless stream whose order depends on the seed alone.

An epoch is one pass over the datasets in the order of their rows, concatenated or interleaved, and
shuffled in a buffer. The rows of all epochs are numbered through; `place` is a row's number. Every
process can walk through the stream, which costs microseconds a row as long as nothing is parsed.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from swiftmeg.data.sources.load import check_mixing, identity
from swiftmeg.data.sources.subset_reader import OriginRow, ReadOptions, SubsetReader, open_dataset
from swiftmeg.data.standard_row import Drops, Row, RowError
from swiftmeg.errors import UserError

StreamRow = tuple[int, OriginRow]
"""The number of the reader that a raw row comes from, and the row."""

LOOKED_AT = 10_000
"""Rows that are tokenised before training where the tokenizer has tokens that the model lacks."""

_DRAWS = 4096


class RowStream:
    """The stream of the datasets that `specs` name (see `load_rows`); `#N` takes the first N rows.

    `shuffle_buffer_size` rows at a time are in the buffer; 0 keeps their order. Raises UserError
    for whatever is wrong with the flags, or where a dataset has no row.
    """

    def __init__(
        self,
        specs: list[str],
        *,
        data_seed: int = 42,
        columns: dict[str, str] | None = None,
        strict: bool = False,
        shuffle_buffer_size: int = 1000,
        interleave_prob: list[float] | None = None,
        stopping_strategy: str = "first_exhausted",
        model_name: list[str] | None = None,
        model_author: list[str] | None = None,
        use_hf: bool = False,
        hub_token: str | None = None,
        download_mode: str = "reuse_dataset_if_exists",
    ) -> None:
        check_mixing(specs, interleave_prob, stopping_strategy, download_mode)
        options = ReadOptions(
            columns=columns or {},
            identity=identity(model_name, model_author),
            data_seed=data_seed,
            num_proc=1,
            strict=strict,
            hub_token=hub_token,
            download_mode=download_mode,
            cached=False,
            for_training=True,
            streaming=True,
        )
        self._seed = data_seed
        self._buffer_size = shuffle_buffer_size
        self._probabilities = interleave_prob
        self._all_exhausted = stopping_strategy == "all_exhausted"
        self._readers: list[SubsetReader] = []
        self._datasets: list[tuple[list[int], int | None]] = []
        """For each dataset the numbers of its readers, and N of `#N`."""
        for spec in specs:
            source, readers = open_dataset(spec, use_hf, options)
            start = len(self._readers)
            self._readers += readers
            self._datasets.append((list(range(start, len(self._readers))), source.sample))

    def describe(self) -> list[Any]:
        """All that the stream depends on, as JSON-able values."""
        return [
            [reader.describe() for reader in self._readers],
            [sample for _, sample in self._datasets],
            [self._seed, self._buffer_size, self._probabilities, self._all_exhausted],
        ]

    def epoch(self, number: int) -> Iterator[StreamRow]:
        """Yield the raw rows of one epoch; each epoch has an order of its own."""
        chooser = np.random.default_rng([self._seed, number])
        sets = [self._dataset(readers, sample) for readers, sample in self._datasets]
        rows = _chain(sets) if self._probabilities is None else self._interleave(sets, chooser)
        if self._buffer_size < 2:
            return rows
        return _shuffle(rows, self._buffer_size, chooser)

    def standard(self, row: StreamRow) -> Row:
        """Return a raw row in standard form; raises RowError, or UserError with `strict`."""
        return self._readers[row[0]].standard(row[1])

    def check(self, encode: Callable[[Row], object] | None = None) -> None:
        """UserError unless some row of the first epoch is usable; reads up to that row.

        With `encode`, the first `LOOKED_AT` rows are read, and what it raises of that kind ends it.
        """
        drops, usable = Drops(), False
        for row in islice(self.epoch(0), LOOKED_AT if encode else None):
            try:
                standard = self.standard(row)
                if encode is not None:
                    encode(standard)
            except RowError as error:
                drops.add(f"{row[1][0]}:{row[1][1][0]}", error)
            else:
                usable = True
                if encode is None:
                    break
        if usable:
            return
        found = f"none of {drops.total} rows can be used: {drops}" if drops.total else "no rows"
        raise UserError(f"--dataset: {found}")

    def _dataset(self, readers: list[int], sample: int | None) -> Iterator[StreamRow]:
        taken = 0
        for number in readers:
            for row in self._readers[number].raw():
                if taken == sample:
                    return
                taken += 1
                yield number, row

    def _interleave(
        self, sets: list[Iterator[StreamRow]], chooser: np.random.Generator
    ) -> Iterator[StreamRow]:
        """Draw from the datasets; one that is exhausted ends the epoch, or begins again."""
        exhausted = [False] * len(sets)
        while True:
            for number in map(int, chooser.choice(len(sets), _DRAWS, p=self._probabilities)):
                row = next(sets[number], None)
                if row is None:
                    exhausted[number] = True
                    if all(exhausted) or not self._all_exhausted:
                        return
                    sets[number] = self._dataset(*self._datasets[number])
                    row = next(sets[number], None)
                    if row is None:
                        return
                yield row


def _chain(sets: list[Iterator[StreamRow]]) -> Iterator[StreamRow]:
    for rows in sets:
        yield from rows


def _shuffle(
    rows: Iterator[StreamRow], size: int, chooser: np.random.Generator
) -> Iterator[StreamRow]:
    """Yield each row in the place of one that is drawn from a buffer of `size` rows."""
    buffer: list[StreamRow] = []
    draws: list[int] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        if not draws:
            draws = chooser.integers(size, size=_DRAWS).tolist()
        place = draws.pop()
        yield buffer[place]
        buffer[place] = row
    for place in chooser.permutation(len(buffer)):
        yield buffer[place]
