"""DeepseekV3ForCausalLM: DeepSeek-V3 and R1, Moonlight, Kimi-K2."""

from typing import Any

from swiftmeg.models.arguments import (
    dense_args,
    dense_then_experts,
    expert_args,
    latent_attention_args,
    refuse,
    shared_size,
    sigmoid_router_args,
)
from swiftmeg.models.families.deepseek_v2 import DEEPSEEK_V2
from swiftmeg.models.family import REGISTRY, HFConfig
from swiftmeg.models.weight_rows import (
    DEEPSEEK_PREDICTIONS,
    EXPERT_BIAS_ROW,
    deepseek_prediction_rows,
)


def to_args(config: HFConfig) -> dict[str, Any]:
    """DeepSeek-V2's layers with a sigmoid router that a bias balances."""
    if (scoring := config.get("scoring_func") or "sigmoid") != "sigmoid":
        raise refuse("scoring_func", scoring, "sigmoid")
    count = config.get("n_routed_experts") or config["num_local_experts"]
    return (
        dense_args(config)
        | latent_attention_args(config)
        | sigmoid_router_args(config, config["num_experts_per_tok"])
        | expert_args(config, count, dense_then_experts(config), shared_size(config))
        | {
            "moe_router_load_balancing_type": "seq_aux_loss",
            "mtp_num_layers": config.get("mtp_num_layers") or None,
        }
    )


DEEPSEEK_V3 = REGISTRY.add(
    DEEPSEEK_V2.variant(
        "DeepseekV3ForCausalLM",
        to_args,
        (EXPERT_BIAS_ROW, *deepseek_prediction_rows((*DEEPSEEK_V2.rows, EXPERT_BIAS_ROW))),
        config_class="deepseek_v3",
        predictions=DEEPSEEK_PREDICTIONS,
    )
)
