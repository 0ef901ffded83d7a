"""Dots1ForCausalLM: dots.llm1."""

from typing import Any

from swiftmeg.models.arguments import (
    dense_args,
    dense_then_experts,
    expert_args,
    shared_size,
    sigmoid_router_args,
)
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig
from swiftmeg.models.weight_rows import EXPERT_BIAS_ROW, MOE_ROWS, shared_expert_rows


def to_args(config: HFConfig) -> dict[str, Any]:
    """Attention with a norm on every query and key head; DeepSeek-V3's experts."""
    bias = config.get("attention_bias", False)
    count = config.get("n_routed_experts") or config["num_local_experts"]
    return (
        dense_args(config)
        | {"qk_layernorm": True, "add_qkv_bias": bias, "attention_output_bias": bias}
        | sigmoid_router_args(config, config["num_experts_per_tok"])
        | expert_args(config, count, dense_then_experts(config), shared_size(config))
        | {"moe_router_load_balancing_type": "seq_aux_loss"}
    )


DOTS1 = REGISTRY.add(
    LLAMA.variant(
        "Dots1ForCausalLM",
        to_args,
        (*MOE_ROWS, *shared_expert_rows("shared_experts"), EXPERT_BIAS_ROW),
    )
)
