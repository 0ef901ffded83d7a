"""Weight layouts: pure tensor functions between Hugging Face tensors and one Megatron parameter.

Each layout answers, about FULL (unsharded) weights, on any device and without process groups: how
HF tensors join into Megatron's parameter, how that parameter splits back, how it is cut into, and
put together from, tensor-parallel shards, and how one shard comes from HF tensors directly. `axis`
is the tensor axis that tensor parallelism cuts (`partition_dim` of the live parameter), None for a
replicated parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftmeg.errors import UserError


@dataclass(frozen=True)
class Dims:
    """The sizes that layouts need, read from the Megatron arguments of a model."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    """Rows of the HF embedding; Megatron's copy may be longer."""
    padded_vocab_size: int


class Layout:
    """One HF tensor, stored as it is."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        """Make the full Megatron parameter from HF tensors, in the order of the row's names."""
        (whole,) = parts
        return whole

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        """Inverse of `join`."""
        return [whole]

    def shard(self, whole: Tensor, axis: int | None, rank: int, size: int) -> Tensor:
        """Return rank `rank`'s part of `whole` when `axis` is cut over `size` ranks."""
        if axis is None or size == 1:
            return whole
        return whole.chunk(size, dim=axis)[rank]

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        """`shard` of `join`; layouts that can touch only what rank `rank` needs."""
        return self.shard(self.join(parts, dims), axis, rank, size)

    def unshard(self, shards: Sequence[Tensor], axis: int | None) -> Tensor:
        """Inverse of `shard` over all ranks; replicated parameters take the first copy."""
        if axis is None or len(shards) == 1:
            return shards[0]
        return torch.cat(list(shards), dim=axis)


class Stacked(Layout):
    """Several equally shaped HF tensors one after the other: `[gate; up]` of a gated MLP.

    Every rank holds its own slice of each part, so a shard is `[gate_r; up_r]`.
    """

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return torch.cat(list(parts))

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        return list(whole.chunk(self.parts))

    def shard(self, whole: Tensor, axis: int | None, rank: int, size: int) -> Tensor:
        if axis is None or size == 1:
            return whole
        return self._cut(whole.chunk(self.parts), axis, rank, size)

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        return self._cut(parts, axis, rank, size)

    def _cut(self, parts: Sequence[Tensor], axis: int | None, rank: int, size: int) -> Tensor:
        return torch.cat([super(Stacked, self).shard(part, axis, rank, size) for part in parts])

    def unshard(self, shards: Sequence[Tensor], axis: int | None) -> Tensor:
        if axis is None or len(shards) == 1:
            return shards[0]
        columns = zip(*(shard.chunk(self.parts) for shard in shards), strict=True)
        return torch.cat([torch.cat(column, dim=axis) for column in columns])


class StackedTogether(Stacked):
    """The same parts in one HF tensor, one after the other."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        (whole,) = parts
        return whole

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        return [whole]

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        return self.shard(parts[0], axis, rank, size)


class GateUpColumns(StackedTogether):
    """GPT-OSS's gate and up of one expert: [in, 2 * out], alternating columns; biases likewise."""

    def __init__(self) -> None:
        super().__init__(parts=2)

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        rows = parts[0].t()
        return torch.cat([rows[0::2], rows[1::2]])

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        return [torch.stack(whole.chunk(2), dim=1).flatten(0, 1).t()]

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        return self.shard(self.join(parts, dims), axis, rank, size)


class Transposed(Layout):
    """One HF matrix [in, out]."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return parts[0].t()

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        return [whole.t()]


class InterleavedQKV(Layout):
    """Query, key and value projections, grouped by key-value head: `[q..., k, v]` a group.

    Works for weights `[heads * head_dim, hidden]` and biases `[heads * head_dim]`.
    """

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        grouped = [part.unflatten(0, (dims.num_query_groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        heads = dims.num_attention_heads // dims.num_query_groups
        sizes = [heads * dims.kv_channels, dims.kv_channels, dims.kv_channels]
        grouped = whole.unflatten(0, (dims.num_query_groups, -1))
        return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]


class Vocabulary(Layout):
    """Embedding or output rows; Megatron's copy ends in zero rows that HF never sees."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        (rows,) = parts
        if rows.shape[0] != dims.vocab_size:
            raise UserError(
                f"it says vocab_size={dims.vocab_size}, but there are {rows.shape[0]} rows"
            )
        missing = dims.padded_vocab_size - dims.vocab_size
        return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        return [whole[: dims.vocab_size]]


class SwappedHalves(Layout):
    """One HF tensor whose last axis holds two halves in the other order."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        (whole,) = parts
        return torch.cat(whole.chunk(2, dim=-1)[::-1], dim=-1)

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        return [self.join([whole], dims)]


class OneRow(Layout):
    """A vector that HF stores as a matrix of one row."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return parts[0].squeeze(0)

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        return [whole.unsqueeze(0)]


COPY = Layout()
GATE_UP = Stacked(2)
GATE_UP_TOGETHER = StackedTogether(2)
GATE_UP_COLUMNS = GateUpColumns()
TRANSPOSED = Transposed()
QKV = InterleavedQKV()
VOCABULARY = Vocabulary()
SWAPPED_HALVES = SwappedHalves()
ONE_ROW = OneRow()
