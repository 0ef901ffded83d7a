"""Qwen2MoeForCausalLM: Qwen1.5-MoE, Qwen2-57B-A14B."""

from typing import Any

from swiftmeg.models.arguments import dense_args, expert_args, softmax_router_args
from swiftmeg.models.families.qwen2 import QWEN2
from swiftmeg.models.family import REGISTRY, HFConfig, row
from swiftmeg.models.weight_rows import HF_MLP, MLP, MOE_ROWS, shared_expert_rows


def sparse_layers(config: HFConfig) -> list[int]:
    """1 for the layers with experts: every `decoder_sparse_step`-th not in `mlp_only_layers`."""
    every, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    layers = range(config["num_hidden_layers"])
    return [int(i not in dense and (i + 1) % every == 0) for i in layers]


def to_args(config: HFConfig) -> dict[str, Any]:
    """A shared expert stands beside the routed ones, behind a sigmoid gate."""
    shared = config["shared_expert_intermediate_size"]
    return (
        dense_args(config, windows=True)
        | {"add_qkv_bias": config.get("qkv_bias", True), "moe_shared_expert_gate": True}
        | softmax_router_args(config, config["num_experts_per_tok"])
        | expert_args(config, config["num_experts"], sparse_layers(config), shared)
    )


QWEN2_MOE = REGISTRY.add(
    QWEN2.variant(
        "Qwen2MoeForCausalLM",
        to_args,
        (
            *MOE_ROWS,
            *shared_expert_rows("shared_expert"),
            row(MLP + "shared_experts.gate_weight", HF_MLP + "shared_expert_gate.weight"),
        ),
    )
)
