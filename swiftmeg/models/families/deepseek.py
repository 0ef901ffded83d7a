"""DeepseekForCausalLM: DeepSeek-MoE-16B."""

from typing import Any

from swiftmeg.models.arguments import (
    dense_args,
    dense_then_experts,
    expert_args,
    refuse,
    shared_size,
    softmax_router_args,
)
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig
from swiftmeg.models.weight_rows import MOE_ROWS, shared_expert_rows


def to_args(config: HFConfig) -> dict[str, Any]:
    """Llama's attention; dense layers first, then experts with shared ones beside them."""
    if config.get("attention_bias"):
        raise refuse("attention_bias", True, "false")
    if (scoring := config.get("scoring_func") or "softmax") != "softmax":
        raise refuse("scoring_func", scoring, "softmax")
    return (
        dense_args(config)
        | softmax_router_args(config, config["num_experts_per_tok"])
        | expert_args(
            config, config["n_routed_experts"], dense_then_experts(config), shared_size(config)
        )
        | {"moe_router_load_balancing_type": "seq_aux_loss"}
    )


DEEPSEEK = REGISTRY.add(
    LLAMA.variant(
        "DeepseekForCausalLM",
        to_args,
        (*MOE_ROWS, *shared_expert_rows("shared_experts")),
        config_class="llama",
    )
)
