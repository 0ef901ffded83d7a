"""Every weight layout as pure tensor functions, up to 8 tensor-parallel ranks."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.models import layout
from swiftmeg.models.layout import Dims, Layout

DIMS = Dims(
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=4,
    vocab_size=100,
    padded_vocab_size=128,
    linear_num_key_heads=8,
    linear_num_value_heads=16,
    linear_key_head_dim=4,
)
ONE_GROUP = Dims(16, 1, 4, 100, 128)
"""Fewer query groups than ranks: Megatron then cuts inside a group."""

SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """A layout, the shapes of its HF tensors and the axis that tensor parallelism cuts."""

    layout: str
    shapes: tuple[tuple[int, ...], ...]
    axis: int | None = None
    dims: Dims = DIMS
    whole_blocks: bool = False
    """A shard takes values from all of the HF tensors, so `cut` hands out all of them."""

    @property
    def name(self) -> str:
        shapes = "+".join("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.layout}-{shapes}-axis{self.axis}-groups{self.dims.num_query_groups}"


def cases(
    name: str,
    *shapes: tuple[int, ...],
    axes: tuple[int | None, ...] = (0, None),
    dims: Dims = DIMS,
    whole_blocks: bool = False,
) -> list[Case]:
    return [Case(name, shapes, axis, dims, whole_blocks) for axis in axes]


CASES = [
    *cases("COPY", (16, 24), axes=(0, 1, None)),
    *cases("COPY", (16,)),
    *cases("GATE_UP", (16, 8), (16, 8), axes=(0, 1, None)),
    *cases("GATE_UP", (16,), (16,)),
    *cases("GATE_UP_TOGETHER", (32, 8), axes=(0, 1, None)),
    *cases("GATE_UP_COLUMNS", (8, 32), axes=(0, 1, None)),
    *cases("GATE_UP_COLUMNS", (32,)),
    *cases("TRANSPOSED", (8, 16), axes=(0, 1, None)),
    *cases("QKV", (64, 24), (32, 24), (32, 24)),
    *cases("QKV", (64, 24), (32, 24), (32, 24), axes=(1,), whole_blocks=True),
    *cases("QKV", (64,), (32,), (32,)),
    *cases("QKV", (64, 24), (4, 24), (4, 24), dims=ONE_GROUP, whole_blocks=True),
    *cases("GATED_QKV", (128, 24), (32, 24), (32, 24)),
    *cases("GATED_QKV", (128,), (32,), (32,)),
    *cases("GATED_QKV", (128, 24), (4, 24), (4, 24), dims=ONE_GROUP, whole_blocks=True),
    *cases("DELTA_INPUTS", (8 * (2 * 4 + 2 * 2 * 6), 24), (8 * 2 * 2, 24), axes=(0, 1, None)),
    *cases("DELTA_CONVOLUTION", (8 * (4 + 4 + 2 * 6), 1, 3), whole_blocks=True),
    *cases("VOCABULARY", (100, 8)),
    *cases("SWAPPED_HALVES", (16, 32), axes=(0, 1, None), whole_blocks=True),
    *cases("ONE_ROW", (1, 16), axes=(None,)),
    *cases("ONE_ROW", (1, 16), axes=(0,), whole_blocks=True),
]


def tensors(case: Case) -> list[Tensor]:
    """HF tensors in which every value is another."""
    sizes = [torch.Size(shape).numel() for shape in case.shapes]
    values = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1)).float() + 1
    return [part.view(shape) for part, shape in zip(values.split(sizes), case.shapes, strict=True)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def named(case: Case) -> Layout:
    return getattr(layout, case.layout)


def test_every_layout_has_a_case() -> None:
    there = {name for name, value in vars(layout).items() if isinstance(value, Layout)}
    assert there == {case.layout for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_split_is_the_inverse_of_join(case: Case) -> None:
    parts = tensors(case)
    whole = named(case).join(parts, case.dims)
    assert equal(named(case).split(whole, case.dims), parts)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_make_the_whole(case: Case, size: int) -> None:
    whole = named(case).join(tensors(case), case.dims)
    shards = [named(case).shard(whole, case.axis, rank, size) for rank in range(size)]
    assert equal([named(case).unshard(shards, case.axis)], [whole])
    if case.axis is not None:
        assert sum(shard.numel() for shard in shards) == whole.numel()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_make_the_shard(case: Case, size: int) -> None:
    parts = tensors(case)
    whole = named(case).join(parts, case.dims)
    read = 0
    for rank in range(size):
        where = (case.dims, case.axis, rank, size)
        blocks = named(case).cut(parts, *where)
        read += sum(block.numel() for block in blocks)
        expected = named(case).shard(whole, case.axis, rank, size)
        assert equal([named(case).join_shard(blocks, *where)], [expected]), rank
    everyone = case.whole_blocks or case.axis is None
    assert read == sum(part.numel() for part in parts) * (size if everyone else 1)


@pytest.mark.parametrize(
    ("name", "shapes", "rank", "expected"),
    [
        ("GATE_UP", [(4,), (4,)], 1, [2, 3, 6, 7]),
        ("GATE_UP_TOGETHER", [(8,)], 1, [2, 3, 6, 7]),
        ("GATE_UP_COLUMNS", [(8,)], 1, [4, 6, 5, 7]),
        # Two heads a group of size 1: q0 q1 k0 v0, q2 q3 k1 v1.
        ("QKV", [(4,), (2,), (2,)], 1, [2, 3, 5, 7]),
        # Query and gate of a head are neighbours in HF's projection; Megatron has queries first.
        ("GATED_QKV", [(8,), (2,), (2,)], 1, [4, 6, 5, 7, 9, 11]),
        # q, k, v, v, z, z of a key head, then b, b, a, a.
        ("DELTA_INPUTS", [(12,), (8,)], 1, [6, 7, 8, 9, 10, 11, 16, 17, 18, 19]),
        ("DELTA_CONVOLUTION", [(8,)], 1, [1, 3, 6, 7]),
        ("SWAPPED_HALVES", [(4,)], 1, [0, 1]),
    ],
)
def test_shards_hold_what_megatron_reads(
    name: str, shapes: list[tuple[int, ...]], rank: int, expected: list[int]
) -> None:
    dims = Dims(4, 2, 1, 4, 4, 2, 4, 1)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = [part.view(s) for part, s in zip(torch.arange(sum(sizes)).split(sizes), shapes)]
    layout_ = getattr(layout, name)
    assert layout_.shard(layout_.join(parts, dims), 0, rank, 2).tolist() == expected


def test_the_vocabulary_is_padded_with_zeros() -> None:
    rows = torch.ones(100, 8)
    shards = [layout.VOCABULARY.join_shard([rows[at : at + 16]], DIMS, 0, 0, 8) for at in (0, 96)]
    assert [int(shard[:, 0].sum()) for shard in shards] == [16, 4]
    assert shards[1].shape == (16, 8)


@pytest.mark.parametrize(
    ("name", "shape", "axis", "size"),
    [("COPY", (18, 8), 0, 4), ("TRANSPOSED", (18, 8), 1, 4), ("COPY", (16,), 1, 2)],
)
def test_what_cannot_be_cut_is_refused(
    name: str, shape: tuple[int, ...], axis: int, size: int
) -> None:
    with pytest.raises(UserError, match="cannot be cut"):
        getattr(layout, name).cut([torch.zeros(shape)], DIMS, axis, 0, size)


def test_another_length_of_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size=100, but there are 99 rows"):
        layout.VOCABULARY.cut([torch.zeros(99, 8)], DIMS, 0, 0, 2)
