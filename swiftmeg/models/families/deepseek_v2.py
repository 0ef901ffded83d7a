"""DeepseekV2ForCausalLM: DeepSeek-V2, V2-Lite, V2.5, DeepSeek-Coder-V2."""

from typing import Any

from swiftmeg.models.arguments import (
    dense_args,
    dense_then_experts,
    expert_args,
    group_args,
    latent_attention_args,
    refuse,
    shared_size,
    softmax_router_args,
)
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig
from swiftmeg.models.weight_rows import MLA_ROWS, MOE_ROWS, shared_expert_rows


def _router_args(config: HFConfig) -> dict[str, Any]:
    """Scores are never normalised; groups of experts count by their best one."""
    topk, method = config["num_experts_per_tok"], config.get("topk_method") or "greedy"
    if config.get("norm_topk_prob"):
        raise refuse("norm_topk_prob", True, "false")
    args = softmax_router_args(config, topk)
    scaling = config.get("routed_scaling_factor") or 1.0
    args["moe_router_topk_scaling_factor"] = scaling if scaling != 1.0 else None
    if method == "greedy":
        return args
    if method != "group_limited_greedy":
        raise refuse("topk_method", method, "greedy or group_limited_greedy")
    return args | group_args(config, topk, least=1) | {"router_best_of_group": True}


def to_args(config: HFConfig) -> dict[str, Any]:
    """Latent attention; dense layers first, then experts with shared ones beside them."""
    count = config["n_routed_experts"]
    return (
        dense_args(config)
        | latent_attention_args(config)
        | _router_args(config)
        | expert_args(config, count, dense_then_experts(config), shared_size(config))
        | {"moe_router_load_balancing_type": "seq_aux_loss"}
    )


DEEPSEEK_V2 = REGISTRY.add(
    LLAMA.variant(
        "DeepseekV2ForCausalLM",
        to_args,
        (*MOE_ROWS, *MLA_ROWS, *shared_expert_rows("shared_experts")),
    )
)
