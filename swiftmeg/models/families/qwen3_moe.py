"""Qwen3MoeForCausalLM: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder."""

from typing import Any

from swiftmeg.models.arguments import expert_args, softmax_router_args
from swiftmeg.models.families import qwen3
from swiftmeg.models.families.qwen2_moe import sparse_layers
from swiftmeg.models.family import REGISTRY, HFConfig
from swiftmeg.models.weight_rows import MOE_ROWS


def to_args(config: HFConfig) -> dict[str, Any]:
    """Qwen3's attention with routed experts only; newer configs call them num_local_experts."""
    count = config.get("num_experts") or config["num_local_experts"]
    return (
        qwen3.to_args(config)
        | softmax_router_args(config, config["num_experts_per_tok"])
        | expert_args(config, count, sparse_layers(config))
    )


QWEN3_MOE = REGISTRY.add(qwen3.QWEN3.variant("Qwen3MoeForCausalLM", to_args, MOE_ROWS))
