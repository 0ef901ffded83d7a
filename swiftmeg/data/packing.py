"""Packs: groups of rows that together fill a given number of tokens."""

from collections.abc import Sequence
from typing import Any

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
        lengths = [int(length) for length in dataset["length"]]
        self.packs = pack(lengths, max_length)
        self.fill = sum(lengths) / (max_length * len(self.packs)) if self.packs else 0.0
        """The share of the packs' room that rows take up."""

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.dataset[row] for row in self.packs[index]]
