"""Files of tokenised rows, written once and read at any place.

`tokens.bin` holds the ids of all rows behind one another (int32); of a token that is not trained,
the complement `~id`, which is negative. `ends.bin` (int64) holds where in it each row ends,
`rows.bin` (int64) which row it was. `weights.bin` (float32), if tokens have weights in the loss,
holds those of all tokens.

Tokens are read by `pread`, not through a mapping: pages that a process has touched in a mapping
count as its memory, and reading rows in random order would sooner or later touch all of them.
"""

import os
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from torch.utils.data import Dataset

from swiftmeg.data.template.template import IGNORE, Encoded
from swiftmeg.errors import UserError

Array = np.ndarray[Any, Any]

WEIGHTS = "weights.bin"

_BLOCK = 1 << 20  # tokens


class EncodedChunk(NamedTuple):
    """Some rows in the form of the files: int32 [tokens], int64 [rows] twice, and perhaps float32
    [tokens]."""

    tokens: Array
    lengths: Array
    rows: Array
    weights: Array | None = None


def encoded_chunk(encoded: list[Encoded], rows: list[int]) -> EncodedChunk:
    """Join encoded rows, which are the rows numbered `rows`."""
    lengths = np.array([len(each.input_ids) for each in encoded], dtype=np.int64)
    if not encoded:
        return EncodedChunk(np.empty(0, dtype=np.int32), lengths, lengths)
    ids = np.concatenate([each.input_ids for each in encoded])
    labels = np.concatenate([each.labels for each in encoded])
    tokens = np.where(labels == IGNORE, ~ids, ids)
    weights = [each.loss_scale for each in encoded if each.loss_scale is not None]
    return EncodedChunk(
        tokens,
        lengths,
        np.array(rows, dtype=np.int64),
        np.concatenate(weights) if weights else None,
    )


class TokenWriter:
    """Writes the files of `folder` chunk by chunk."""

    def __init__(self, folder: Path, weighted: bool = False) -> None:
        self._tokens, self._ends, self._rows = (
            (folder / name).open("wb") for name in ("tokens.bin", "ends.bin", "rows.bin")
        )
        self._weights = (folder / WEIGHTS).open("wb") if weighted else None
        self._written = 0

    def write(self, chunk: EncodedChunk) -> None:
        """Append the rows of a chunk."""
        self._tokens.write(chunk.tokens.data)
        self._ends.write((chunk.lengths.cumsum() + self._written).data)
        self._rows.write(chunk.rows.data)
        if self._weights is not None and chunk.weights is not None:
            self._weights.write(chunk.weights.data)
        self._written += len(chunk.tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._tokens, self._ends, self._rows, self._weights):
            if file is not None:
                file.close()


class TokenDataset(Dataset[dict[str, Any]]):
    """The tokenised rows of a folder; item i is the stored row `order[i]`, or row i without.

    An item has `input_ids` and `labels`, int32 [length], `length`, and `loss_scale`, float32
    [length], if there are weights. With `reference`, a file of float32 [stored rows], it has its
    number there as `ref_logps`. Only `order` and the rows that were asked for are in memory.
    """

    def __init__(
        self, folder: Path, order: Array | None = None, reference: Path | None = None
    ) -> None:
        self.folder = folder
        self._reference: Array | None = None
        self._order = order
        self._ends = _mapped(folder / "ends.bin")
        self._file = (folder / "tokens.bin").open("rb", buffering=0)
        weighted = (folder / WEIGHTS).exists()
        self._weights = (folder / WEIGHTS).open("rb", buffering=0) if weighted else None
        if reference is not None:
            self.attach_reference(reference)

    def __len__(self) -> int:
        return len(self._ends) if self._order is None else len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = int(index % len(self) if self._order is None else self._order[index])
        start, end = int(self._ends[place - 1]) if place else 0, int(self._ends[place])
        tokens = _read(self._file, start, end)
        untrained = tokens < 0
        ids = np.where(untrained, ~tokens, tokens)
        labels = np.where(untrained, np.int32(IGNORE), tokens)
        row: dict[str, Any] = {"input_ids": ids, "labels": labels, "length": len(ids)}
        if self._weights is not None:
            row["loss_scale"] = _read(self._weights, start, end).view(np.float32)
        if self._reference is not None:
            row["ref_logps"] = float(self._reference[place])
        return row

    def attach_reference(self, file: Path) -> None:
        """Give rows a reference's log-probabilities; see the class."""
        self._reference_file = file
        self._reference = np.memmap(file, dtype=np.float32, mode="r")
        if len(self._reference) != len(self._ends):
            raise UserError(f"{file} is cut short: delete its folder")

    def __reduce__(self) -> tuple[Any, ...]:
        file = None if self._reference is None else self._reference_file
        return TokenDataset, (self.folder, self._order, file)

    def rows(self) -> Array:
        """Return which of the rows that were encoded each stored one is (int64, ascending)."""
        return _mapped(self.folder / "rows.bin")

    def lengths(self) -> Array:
        """Return the tokens of each row (int32 [rows])."""
        return self._ordered(np.diff(self._ends, prepend=0).astype(np.int32))

    def trained(self) -> Array:
        """Return the trained tokens of each row (int32 [rows])."""
        counts = np.zeros(len(self._ends), dtype=np.int32)
        row = 0
        while row < len(self._ends):
            start = int(self._ends[row - 1]) if row else 0
            stop = max(int(self._ends.searchsorted(start + _BLOCK, side="right")), row + 1)
            flags = _read(self._file, start, int(self._ends[stop - 1])) >= 0
            starts = np.concatenate([[start], self._ends[row : stop - 1]]) - start
            counts[row:stop] = np.add.reduceat(flags, starts, dtype=np.int32)
            row = stop
        return self._ordered(counts)

    def _ordered(self, values: Array) -> Array:
        return values if self._order is None else values[self._order]


def _read(file: FileIO, start: int, end: int) -> Array:
    """Return the values [start, end) of a file of int32."""
    wanted, parts = 4 * (end - start), []
    while wanted:  # one call returns less than 2 GiB, and may return less than it was asked for
        part = os.pread(file.fileno(), wanted, 4 * end - wanted)
        if not part:
            raise OSError(f"{file.name} is cut short: delete its folder")
        parts.append(part)
        wanted -= len(part)
    return np.frombuffer(b"".join(parts), dtype=np.int32)


def _mapped(path: Path) -> Array:
    # An empty file cannot be mapped.
    if not path.stat().st_size:
        return np.empty(0, dtype=np.int64)
    return np.memmap(path, dtype=np.int64, mode="r")


class PairDataset(Dataset[dict[str, Any]]):
    """Stored pairs: item i has `chosen` and `rejected`, items of `sides`, which alternate in it."""

    def __init__(self, sides: TokenDataset) -> None:
        self.sides = sides

    def __len__(self) -> int:
        return len(self.sides) // 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"chosen": self.sides[2 * index], "rejected": self.sides[2 * index + 1]}

    def lengths(self) -> np.ndarray[Any, Any]:
        """Return the tokens of each pair (int32 [pairs])."""
        return self.sides.lengths().reshape(-1, 2).sum(1, dtype=np.int32)
