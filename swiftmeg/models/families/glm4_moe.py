"""Glm4MoeForCausalLM: GLM-4.5, GLM-4.5-Air, GLM-4.6."""

from typing import Any

from swiftmeg.models.arguments import (
    dense_args,
    dense_then_experts,
    expert_args,
    rotary_percent,
    shared_size,
    sigmoid_router_args,
)
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig
from swiftmeg.models.weight_rows import (
    DEEPSEEK_PREDICTIONS,
    EXPERT_BIAS_ROW,
    MOE_ROWS,
    deepseek_prediction_rows,
    shared_expert_rows,
)

_ROWS = (*MOE_ROWS, *shared_expert_rows("shared_experts"), EXPERT_BIAS_ROW)


def to_args(config: HFConfig) -> dict[str, Any]:
    """Biases on q, k and v only, RoPE on a part of each head, DeepSeek-V3's experts."""
    count = config.get("n_routed_experts") or config["num_local_experts"]
    return (
        dense_args(config)
        | {
            "add_qkv_bias": config.get("attention_bias", False),
            "qk_layernorm": config.get("use_qk_norm", False),
            "rotary_percent": rotary_percent(config),
            "mtp_num_layers": config.get("mtp_num_layers") or None,
        }
        | sigmoid_router_args(config, config["num_experts_per_tok"])
        | expert_args(config, count, dense_then_experts(config), shared_size(config))
        | {"moe_router_load_balancing_type": "seq_aux_loss"}
    )


GLM4_MOE = REGISTRY.add(
    LLAMA.variant(
        "Glm4MoeForCausalLM",
        to_args,
        (*_ROWS, *deepseek_prediction_rows(_ROWS)),
        predictions=DEEPSEEK_PREDICTIONS,
    )
)
