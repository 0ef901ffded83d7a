"""MiniMaxM2ForCausalLM: MiniMax-M2, M2.1 and M2.5."""

from typing import Any

from swiftmeg.models.arguments import (
    dense_args,
    expert_args,
    rotary_percent,
    sigmoid_router_args,
)
from swiftmeg.models.families.mixtral import MIXTRAL
from swiftmeg.models.family import REGISTRY, HFConfig, row
from swiftmeg.models.weight_rows import HF_LAYER, MLP


def to_args(config: HFConfig) -> dict[str, Any]:
    """Experts as in Mixtral behind DeepSeek-V3's router, without groups and scaling.

    Norms go over all queries and keys of a token together, RoPE turns a part of each head.
    """
    sizes = {"moe_intermediate_size": config["intermediate_size"]}
    layers = [1] * config["num_hidden_layers"]
    return (
        dense_args(config)
        | {
            "qk_layernorm": True,
            "qk_norm_across_heads": True,
            "rotary_percent": rotary_percent(config),
        }
        | sigmoid_router_args({}, config["num_experts_per_tok"])
        | expert_args(sizes, config["num_local_experts"], layers)
    )


MINIMAX_M2 = REGISTRY.add(
    MIXTRAL.variant(
        "MiniMaxM2ForCausalLM",
        to_args,
        (
            row(
                MLP + "router.expert_bias",
                HF_LAYER + "block_sparse_moe.e_score_correction_bias",
                fp32=True,
            ),
        ),
        config_class="minimax_m2",
    )
)
