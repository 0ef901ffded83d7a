"""Packs: groups of rows that together fill a given number of tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from swiftmeg.errors import UserError

WINDOW = 8192
"""Rows that are packed together. Longer windows fill packs hardly better and mix rows less."""


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Return groups of row indices whose lengths sum to at most `max_length`.

    Every row is in exactly one group and is never split. First-fit decreasing: within a window,
    rows from the longest down each go into the first group that has room. The outcome depends on
    the arguments only. Raises UserError if a row is longer than `max_length`.
    """
    for index, length in enumerate(lengths):
        if length > max_length:
            raise UserError(
                f"--packing true: row {index + 1} has {length} tokens, more than --max_length "
                f"{max_length}: set --truncation_strategy, or raise --max_length"
            )
    packs: list[list[int]] = []
    for start in range(0, len(lengths), WINDOW):
        indices = range(start, min(start + WINDOW, len(lengths)))
        packs += _first_fit_decreasing(indices, lengths, max_length)
    return packs


def _first_fit_decreasing(
    indices: range, lengths: Sequence[int], max_length: int
) -> list[list[int]]:
    # A tree over the groups' free room, with the maximum of both children in each node, finds the
    # first group with enough room in logarithmic time. Node 1 is the root, leaves come last.
    leaves = 1 << (len(indices) - 1).bit_length()
    room = [max_length] * (2 * leaves)
    groups: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < lengths[index]:
                node += 1
        if node - leaves == len(groups):
            groups.append([])
        groups[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sorted(sorted(group) for group in groups)


class PackedDataset(Dataset[list[dict[str, Any]]]):
    """A dataset of packs: item i is the list of encoded rows of pack i.

    `dataset` has the columns `input_ids`, `labels` and `length`, as `encode_rows` returns it.
    """

    def __init__(self, dataset: Any, max_length: int) -> None:
        self.dataset = dataset
        lengths = _lengths(dataset)
        # Lists of lists would take ten times as much memory, in every rank.
        rows, sizes = [np.empty(0, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
        for start in range(0, len(lengths), WINDOW):
            packs = pack(lengths[start : start + WINDOW].tolist(), max_length)
            rows.append(np.concatenate(packs).astype(np.int64) + start)
            sizes.append(np.array([len(group) for group in packs]))
        self._rows = np.concatenate(rows)
        self._borders = np.concatenate(sizes).cumsum()
        self.fill = float(lengths.sum()) / (max_length * len(self)) if len(self) else 0.0
        """The share of the packs' room that rows take up."""

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        rows = self._rows[self._borders[index] : self._borders[index + 1]]
        return [self.dataset[int(row)] for row in rows]


def _lengths(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    if not len(dataset):
        return np.empty(0, dtype=np.int64)
    batches = dataset.select_columns(["length"]).with_format("numpy").iter(batch_size=100_000)
    return np.concatenate([batch["length"].astype(np.int64) for batch in batches])
