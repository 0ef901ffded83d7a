"""Blocks of tensors in files, of which nothing is read until somebody asks for their values."""

from collections.abc import Callable, Sequence

import torch

Block = tuple[slice, ...]
"""Which part of a tensor along each of its axes; starts and stops are given."""


def whole(shape: Sequence[int]) -> Block:
    """All of a tensor."""
    return tuple(slice(0, size) for size in shape)


def within(block: Block, around: Block) -> Block:
    """Where `block` lies in `around`, which holds all of it."""
    pairs = zip(block, around, strict=True)
    return tuple(slice(b.start - a.start, b.stop - a.start) for b, a in pairs)


class StoredPart:
    """A block of a tensor that `read_block` reads; taking blocks of it costs nothing."""

    def __init__(
        self,
        read_block: Callable[[Block], torch.Tensor],
        shape: Sequence[int],
        block: Block | None = None,
    ) -> None:
        """`shape` is that of the tensor; `block` is all of it where it is not given."""
        self._read_block = read_block
        self._whole = torch.Size(shape)
        self._block = block or whole(shape)

    @property
    def shape(self) -> torch.Size:
        """That of the block."""
        return torch.Size(each.stop - each.start for each in self._block)

    def narrow(self, dim: int, start: int, length: int) -> "StoredPart":
        """The `length` places from `start` on of one axis."""
        begin = self._block[dim].start + start
        within = (*self._block[:dim], slice(begin, begin + length), *self._block[dim + 1 :])
        return StoredPart(self._read_block, self._whole, within)

    def chunk(self, count: int) -> "list[StoredPart]":
        """`count` equal blocks along the first axis."""
        length = self.shape[0] // count
        return [self.narrow(0, number * length, length) for number in range(count)]

    def then(self, change: Callable[[torch.Tensor, Block], torch.Tensor]) -> "StoredPart":
        """A part whose values are what `change` makes of each block, whose place in it is given."""
        return StoredPart(
            lambda block: change(self._read_block(block), within(block, self._block)),
            *(self._whole, self._block),
        )

    def read(self) -> torch.Tensor:
        """The block's values, on the CPU."""
        return self._read_block(self._block)
