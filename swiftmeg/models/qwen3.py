"""Qwen3ForCausalLM: the dense Qwen3 models."""

from typing import Any

from swiftmeg.models.family import DENSE_ROWS, REGISTRY, Family, HFConfig, dense_args
from swiftmeg.models.qwen2 import refuse_sliding_window


def to_args(config: HFConfig) -> dict[str, Any]:
    """Every query and key head is normalised; head_dim is independent of hidden_size."""
    refuse_sliding_window(config)
    attention_bias = config.get("attention_bias", False)
    return dense_args(config) | {
        "qk_layernorm": True,
        "add_qkv_bias": attention_bias,
        "attention_output_bias": attention_bias,
    }


QWEN3 = REGISTRY.add(Family("Qwen3ForCausalLM", to_args, DENSE_ROWS))
