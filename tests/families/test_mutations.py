"""What the tests of families must notice: each mistake in a family shows in its logits or names."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.models.family import Family, HFConfig, Row
from swiftmeg.models.layout import (
    COPY,
    TRANSPOSED,
    DeltaInputs,
    Dims,
    GatedQKV,
    InterleavedQKV,
)
from swiftmeg.models.layout import Layout as WeightLayout
from tests.families.conversion import Layout, difference
from tests.ranks import run_ranks

Mutation = Callable[[Family], Family]


def _rows(change: Callable[[Row], Row | None]) -> Mutation:
    """Change rows; None drops one."""

    def mutate(family: Family) -> Family:
        rows = tuple(new for old in family.rows if (new := change(old)) is not None)
        assert rows != family.rows
        return dataclasses.replace(family, rows=rows)

    return mutate


def _args(**wrong: Any) -> Mutation:
    """Give Megatron wrong arguments."""

    def mutate(family: Family) -> Family:
        def to_args(config: HFConfig) -> dict[str, Any]:
            args = family.to_args(config)
            assert any(args.get(key) != value for key, value in wrong.items())
            return args | wrong

        return dataclasses.replace(family, to_args=to_args)

    return mutate


def _layouts(name: str, layout: WeightLayout) -> Mutation:
    """Give weights whose name contains `name` another layout."""
    return _rows(lambda row: dataclasses.replace(row, layout=layout) if name in row.mcore else row)


def _swap(old: Row, one: str, other: str) -> Row:
    swapped = {one: other, other: one}
    for word, replacement in swapped.items():
        if old.mcore.endswith(word):
            return dataclasses.replace(old, mcore=old.mcore.replace(word, replacement))
    return old


class _QKVTaken(GatedQKV):
    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return InterleavedQKV().join(parts, dims)


class _BetaTaken(DeltaInputs):
    def join(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        scalars = parts[1].unflatten(0, (dims.linear_num_key_heads, 2, -1))
        return super().join([parts[0], scalars.flip(1).flatten(0, 2)], dims)


MUTATIONS: dict[str, tuple[str, Mutation]] = {
    "gate and up swapped": (
        "qwen3",
        _rows(lambda row: dataclasses.replace(row, hf=row.hf[::-1]) if "fc1" in row.mcore else row),
    ),
    "gate and up of experts swapped": (
        "qwen3_moe",
        _rows(
            lambda row: (
                dataclasses.replace(row, hf=row.hf[::-1])
                if "experts.linear_fc1" in row.mcore
                else row
            )
        ),
    ),
    "q and k norm swapped": (
        "qwen3",
        _rows(lambda row: _swap(row, "q_layernorm.weight", "k_layernorm.weight")),
    ),
    "norms of the layer swapped": (
        "llama",
        _rows(lambda row: _swap(row, "input_layernorm.weight", "pre_mlp_layernorm.weight")),
    ),
    "latent norm dropped": (
        "deepseek_v3",
        _rows(lambda row: None if row.mcore.endswith("attention.q_layernorm.weight") else row),
    ),
    "bias row dropped": (
        "qwen2",
        _rows(lambda row: None if row.mcore.endswith("linear_qkv.bias") else row),
    ),
    "expert bias dropped": (
        "deepseek_v3",
        _rows(lambda row: None if row.mcore.endswith("expert_bias") else row),
    ),
    "bias not built": ("glm4_moe", _args(add_qkv_bias=False)),
    "wrong rotary fraction": ("glm4_moe", _args(rotary_percent=1.0)),
    "halves turned in place of pairs": ("ernie4_5", _args(rotary_interleaved=False)),
    "norm_topk_prob ignored": ("qwen2_moe-normed", _args(moe_router_pre_softmax=True)),
    "norm_topk_prob assumed": ("qwen2_moe", _args(moe_router_pre_softmax=False)),
    "scaling factor ignored": ("dots1", _args(moe_router_topk_scaling_factor=None)),
    "groups of experts ignored": (
        "deepseek_v3",
        _args(moe_router_num_groups=None, moe_router_group_topk=None),
    ),
    "groups counted by all their experts": ("deepseek_v2", _args(router_best_of_group=False)),
    "softmax taken for sigmoid": ("ernie4_5_moe", _args(router_softmax_bias=False)),
    "shared-expert gate ignored": ("qwen2_moe", _args(moe_shared_expert_gate=False)),
    "shared experts ignored": ("deepseek", _args(moe_shared_expert_intermediate_size=None)),
    "norms after the layer ignored": ("glm4", _args(norm_after=False)),
    "norms after the layer swapped": (
        "glm4",
        _rows(
            lambda row: _swap(row, "post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
        ),
    ),
    "norms before the layer assumed": ("olmo2", _args(norm_before=True)),
    "norm over all heads taken for one a head": ("olmo2", _args(qk_norm_across_heads=False)),
    "windows ignored": ("mistral", _args(window_size=None)),
    "windows in other layers": ("gpt_oss", _args(window_attn_skip_freq=[0, 1, 0, 1])),
    "window one token longer": ("gpt_oss", _args(window_size="7,0")),
    "sinks ignored": ("gpt_oss", _args(softmax_type="vanilla")),
    "gate's clamp ignored": ("gpt_oss", _args(activation_func_clamp_value=None)),
    "offset of up ignored": ("gpt_oss", _args(glu_linear_offset=0.0)),
    "biases of experts ignored": ("gpt_oss", _args(expert_bias=False)),
    "gate and up one after the other": (
        "gpt_oss",
        _rows(
            lambda row: (
                dataclasses.replace(row, layout=TRANSPOSED)
                if "experts.linear_fc1.weight" in row.mcore
                else row
            )
        ),
    ),
    "gate of attention ignored": ("qwen3_next", _args(attention_output_gate=False)),
    "gates and queries one after the other": ("qwen3_next", _layouts("linear_qkv", _QKVTaken())),
    "zero-centred norms taken for plain": ("qwen3_next", _args(apply_layernorm_1p=False)),
    "beta taken for decay": ("qwen3_next", _layouts("in_proj", _BetaTaken())),
    "channels of the convolution as they are": ("qwen3_next", _layouts("conv1d", COPY)),
    "decays swapped": (
        "qwen3_next",
        _rows(lambda row: _swap(row, "attention.dt_bias", "attention.A_log")),
    ),
    "attention in other layers": (
        "qwen3_next",
        _args(linear_attention_freq=[1, 0, 1, 1]),
    ),
    "part of RoPE ignored": ("minimax_m2", _args(rotary_percent=1.0)),
    "dense layer taken for experts": ("qwen3_moe", _args(moe_layer_freq=[1, 1, 1, 1])),
}


def mutated(root: str, names: list[str]) -> dict[str, float | str]:
    """The difference of logits under each mutation, or the line that refuses it."""
    found: dict[str, float | str] = {}
    for name in names:
        specimen, mutation = MUTATIONS[name]
        try:
            value = difference(Path(root) / specimen, Layout(1), mutation)
            assert value is not None
            found[name] = value
        except UserError as error:
            found[name] = str(error)
    return found


def rotated(root: str) -> float | None:
    """The difference where each rank takes the next one's experts."""
    from megatron.core import mpu

    from swiftmeg.export import shards

    size = mpu.get_expert_model_parallel_world_size
    rank = mpu.get_expert_model_parallel_rank
    shards.mpu.get_expert_model_parallel_rank = lambda: (rank() + 1) % size()
    try:
        return difference(Path(root) / "qwen3_moe", Layout(2, expert=2))
    finally:
        shards.mpu.get_expert_model_parallel_rank = rank


@pytest.fixture(scope="module")
def found(
    specimens: Callable[[str], Path], selected: Callable[[str], list[str]]
) -> dict[str, float | str]:
    names = selected("name")
    (root,) = {specimens(MUTATIONS[name][0]).parent for name in names}
    return run_ranks(1, mutated, str(root), names)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(found: dict[str, float | str], name: str) -> None:
    result = found[name]
    if isinstance(result, str):
        assert re.search("missing|no place in|no weights for|does not fit", result)
    else:
        assert not result <= 1e-3  # ten times what equal models may differ


def test_experts_of_another_rank_are_noticed(specimens: Callable[[str], Path]) -> None:
    ranks = run_ranks(2, rotated, str(specimens("qwen3_moe").parent))
    assert min(value for value in ranks if value is not None) > 1e-3
