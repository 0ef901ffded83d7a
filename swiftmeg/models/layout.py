"""Weight layouts: pure tensor functions between Hugging Face tensors and one Megatron parameter.

Each layout answers, about FULL (unsharded) weights, on any device and without process groups: how
HF tensors join into Megatron's parameter, how that parameter splits back, how it is cut into, and
put together from, tensor-parallel shards, and which blocks of HF tensors make one shard directly.
`axis` is the tensor axis that tensor parallelism cuts (`partition_dim` of the live parameter), None
for a replicated parameter.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

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
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0


class Part(Protocol):
    """A tensor, or what becomes one when it is read, of which blocks can be taken."""

    @property
    def shape(self) -> torch.Size: ...

    def narrow(self, dim: int, start: int, length: int, /) -> Self:
        """The block from `start` on, as torch.Tensor.narrow()."""


class Layout:
    """One HF tensor, stored as it is; shards of other layouts are made of whole tensors."""

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

    def cut[P: Part](
        self, parts: Sequence[P], dims: Dims, axis: int | None, rank: int, size: int
    ) -> list[P]:
        """The blocks of HF tensors that rank `rank`'s shard is made of; UserError if none are."""
        return list(parts)

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        """Make rank `rank`'s shard of what `cut` gave."""
        return self.shard(self.join(parts, dims), axis, rank, size)

    def unshard(self, shards: Sequence[Tensor], axis: int | None) -> Tensor:
        """Inverse of `shard` over all ranks; replicated parameters take the first copy."""
        if axis is None or len(shards) == 1:
            return shards[0]
        return torch.cat(list(shards), dim=axis)


class EvenlyCut(Layout):
    """One HF tensor; every shard is made of even blocks along one of its axes."""

    def hf_axis(self, axis: int, dimensions: int) -> int:
        """The axis of HF tensors that is cut where Megatron cuts `axis`."""
        return axis

    def cut[P: Part](
        self, parts: Sequence[P], dims: Dims, axis: int | None, rank: int, size: int
    ) -> list[P]:
        if axis is None or size == 1:
            return list(parts)
        return [_block(part, self.hf_axis(axis, len(part.shape)), rank, size) for part in parts]

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        return self.join(parts, dims)


def _block[P: Part](part: P, axis: int, rank: int, size: int) -> P:
    if axis >= len(part.shape) or part.shape[axis] % size:
        raise UserError(f"axis {axis} of {tuple(part.shape)} cannot be cut in {size}")
    length = part.shape[axis] // size
    return part.narrow(axis, rank * length, length)


class Stacked(EvenlyCut):
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
        return torch.cat([part.chunk(size, dim=axis)[rank] for part in whole.chunk(self.parts)])

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        return torch.cat(list(parts))

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

    def cut[P: Part](
        self, parts: Sequence[P], dims: Dims, axis: int | None, rank: int, size: int
    ) -> list[P]:
        if axis == 0 and size > 1:
            parts = [_block(parts[0], 0, number, self.parts) for number in range(self.parts)]
        return super().cut(parts, dims, axis, rank, size)


class GateUpColumns(Stacked):
    """GPT-OSS's gate and up of one expert: [in, 2 * out], alternating columns; biases likewise."""

    def __init__(self) -> None:
        super().__init__(parts=2)

    def hf_axis(self, axis: int, dimensions: int) -> int:
        return dimensions - 1 - axis

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        rows = parts[0].t()
        return torch.cat([rows[0::2], rows[1::2]])

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        return [torch.stack(whole.chunk(2), dim=1).flatten(0, 1).t()]

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        return self.join(parts, dims)


class Transposed(EvenlyCut):
    """One HF matrix [in, out]."""

    def hf_axis(self, axis: int, dimensions: int) -> int:
        return dimensions - 1 - axis

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

    def cut[P: Part](
        self, parts: Sequence[P], dims: Dims, axis: int | None, rank: int, size: int
    ) -> list[P]:
        if axis != 0 or dims.num_query_groups % size:
            return list(parts)
        return [_block(part, 0, rank, size) for part in parts]

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        if axis != 0 or dims.num_query_groups % size:
            return super().join_shard(parts, dims, axis, rank, size)
        groups = dims.num_query_groups // size
        return self.join(parts, dataclasses.replace(dims, num_query_groups=groups))


class GatedQKV(InterleavedQKV):
    """The same where the query projection makes a query and a gate for every head: `[q..., gate...,
    k, v]` a group."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        query, key, value = parts
        heads = query.unflatten(0, (dims.num_query_groups, -1, 2, dims.kv_channels))
        return super().join([heads.transpose(1, 2).flatten(0, 3), key, value], dims)

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        grouped = whole.unflatten(0, (dims.num_query_groups, -1))
        rest = grouped.shape[1] - 2 * dims.kv_channels
        query, key, value = grouped.split([rest, dims.kv_channels, dims.kv_channels], dim=1)
        heads = query.unflatten(1, (2, -1, dims.kv_channels)).transpose(1, 2)
        return [heads.flatten(0, 3), key.flatten(0, 1), value.flatten(0, 1)]


class DeltaInputs(EvenlyCut):
    """A gated delta net's two input projections, each in the order of key heads, in that order."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        grouped = [part.unflatten(0, (dims.linear_num_key_heads, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        grouped = whole.unflatten(0, (dims.linear_num_key_heads, -1))
        scalars = 2 * dims.linear_num_value_heads // dims.linear_num_key_heads
        parts = grouped.split([grouped.shape[1] - scalars, scalars], dim=1)
        return [part.flatten(0, 1) for part in parts]

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        heads = dims.linear_num_key_heads // (size if axis == 0 else 1)
        return self.join(parts, dataclasses.replace(dims, linear_num_key_heads=heads))


class DeltaConvolution(Layout):
    """A gated delta net's channels: all queries, keys, then values, in the order of key heads."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        (whole,) = parts
        keys = dims.linear_num_key_heads * dims.linear_key_head_dim
        kinds = whole.split([keys, keys, whole.shape[0] - 2 * keys])
        grouped = [kind.unflatten(0, (dims.linear_num_key_heads, -1)) for kind in kinds]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        grouped = whole.unflatten(0, (dims.linear_num_key_heads, -1))
        size = dims.linear_key_head_dim
        kinds = grouped.split([size, size, grouped.shape[1] - 2 * size], dim=1)
        return [torch.cat([kind.flatten(0, 1) for kind in kinds])]


class Vocabulary(Layout):
    """Embedding or output rows; Megatron's copy ends in zero rows that HF never sees."""

    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        (rows,) = parts
        return self._pad(rows, dims.padded_vocab_size)

    def split(self, whole: Tensor, dims: Dims) -> list[Tensor]:
        return [whole[: dims.vocab_size]]

    def cut[P: Part](
        self, parts: Sequence[P], dims: Dims, axis: int | None, rank: int, size: int
    ) -> list[P]:
        (rows,) = parts
        if rows.shape[0] != dims.vocab_size:
            raise UserError(
                f"it says vocab_size={dims.vocab_size}, but there are {rows.shape[0]} rows"
            )
        if axis != 0 or size == 1:
            return [rows]
        length = dims.padded_vocab_size // size
        start = min(rank * length, dims.vocab_size)
        return [rows.narrow(0, start, min(length, dims.vocab_size - start))]

    def join_shard(
        self, parts: Sequence[Tensor], dims: Dims, axis: int | None, rank: int, size: int
    ) -> Tensor:
        return self._pad(parts[0], dims.padded_vocab_size // (size if axis == 0 else 1))

    def _pad(self, rows: Tensor, length: int) -> Tensor:
        missing = length - rows.shape[0]
        return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


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


COPY = EvenlyCut()
GATE_UP = Stacked(2)
GATE_UP_TOGETHER = StackedTogether(2)
GATE_UP_COLUMNS = GateUpColumns()
TRANSPOSED = Transposed()
QKV = InterleavedQKV()
GATED_QKV = GatedQKV()
DELTA_INPUTS = DeltaInputs()
DELTA_CONVOLUTION = DeltaConvolution()
VOCABULARY = Vocabulary()
SWAPPED_HALVES = SwappedHalves()
ONE_ROW = OneRow()
