"""Packs: groups of rows that together fill a given number of tokens."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from swiftmeg.data.encoded.tokens import PairDataset
from swiftmeg.errors import UserError

Array = np.ndarray[Any, Any]

WINDOW = 8192
"""Rows that are packed together. Longer windows fill packs hardly better and mix rows less."""


def tokens_of(item: dict[str, Any]) -> int:
    """The tokens of an encoded row, or of both sides of a pair."""
    if "input_ids" in item:
        return len(item["input_ids"])
    return sum(map(tokens_of, item.values()))


def pack(lengths: Sequence[int], max_length: int, *, pairs: bool = False) -> list[list[int]]:
    """Return groups of row indices whose lengths sum to at most `max_length`.

    Every row is in exactly one group and is never split. First-fit decreasing: within a window,
    rows from the longest down each go into the first group that has room. The outcome depends on
    the arguments only. Raises UserError if a row is longer than `max_length`; of `pairs`, whose
    sides each have that limit, such a one makes a group of its own.
    """
    rows, borders = _pack(_clipped(np.asarray(lengths), max_length, pairs), max_length)
    listed = rows.tolist()
    return [listed[a:b] for a, b in itertools.pairwise(borders.tolist())]


def _clipped(lengths: Array, max_length: int, pairs: bool) -> Array:
    return np.minimum(lengths, max_length) if pairs else lengths


def _pack(lengths: Array, max_length: int) -> tuple[Array, Array]:
    """Return the row indices of all groups behind one another, and the groups' borders in them.

    Indices are int32 where that is enough: every rank keeps them.
    """
    kind = np.int32 if len(lengths) < 2**31 else np.int64
    if len(lengths) and lengths.max() > max_length:
        index = int((lengths > max_length).argmax())
        raise UserError(
            f"--packing true: row {index + 1} has {lengths[index]} tokens, more than --max_length "
            f"{max_length}: set --truncation_strategy, or raise --max_length"
        )
    rows, sizes = [np.empty(0, dtype=kind)], [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(lengths), WINDOW):
        window = lengths[start : start + WINDOW].astype(np.int64)
        members, counts = _first_fit_decreasing(window, max_length)
        rows.append((members + start).astype(kind))
        sizes.append(counts)
    return np.concatenate(rows), np.concatenate(sizes).cumsum()


def _first_fit_decreasing(lengths: Array, max_length: int) -> tuple[Array, Array]:
    """Return the rows of a window's groups behind one another, and each group's number of rows."""
    group = np.empty(len(lengths), dtype=np.int64)
    from_longest = np.argsort(-lengths, kind="stable")
    group[from_longest] = _groups_of_descending(lengths[from_longest].tolist(), max_length)
    # Within a group in order of rows, and groups in order of their first row.
    _, first, group = np.unique(group, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[group]
    return np.argsort(group, kind="stable"), np.bincount(group)


def _groups_of_descending(lengths: list[int], max_length: int) -> list[int]:
    """Return the group of each of the descending `lengths`: the first that has room."""
    # A tree over the groups' free room, with the maximum of both children in each node, finds the
    # first group with enough room in logarithmic time. Node 1 is the root, leaves come last.
    leaves = 1 << (len(lengths) - 1).bit_length()
    room = [max_length] * (2 * leaves)
    groups: list[int] = []
    for length, same in itertools.groupby(lengths):
        left = len(list(same))
        while left:
            node = 1
            while node < leaves:
                node *= 2
                if room[node] < length:
                    node += 1
            # The next rows of this length go there, too, as long as there is room.
            count = min(left, room[node] // length)
            groups += [node - leaves] * count
            left -= count
            room[node] -= count * length
            while node > 1:
                node //= 2
                room[node] = max(room[2 * node], room[2 * node + 1])
    return groups


class PackedDataset(Dataset[list[dict[str, Any]]]):
    """A dataset of packs: item i is the list of encoded rows, or pairs, of pack i.

    `dataset` has integer indexing and `lengths()`, the tokens of each row.
    """

    def __init__(self, dataset: Any, max_length: int) -> None:
        self.dataset = dataset
        pairs = isinstance(dataset, PairDataset)
        lengths = dataset.lengths()
        # Lists of lists would take ten times as much memory, in every rank.
        self._rows, self._borders = _pack(_clipped(lengths, max_length, pairs), max_length)
        self.longest = max(max_length, int(lengths.max())) if pairs else max_length
        """The most tokens of a pack."""
        self.fill = float(lengths.sum()) / (max_length * len(self)) if len(self) else 0.0
        """The share of the packs' room that rows take up."""

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        rows = self._rows[self._borders[index] : self._borders[index + 1]]
        return [self.dataset[int(row)] for row in rows]
