"""Qwen3ForCausalLM: the dense Qwen3 models."""

from typing import Any

from swiftmeg.models.arguments import dense_args
from swiftmeg.models.families.qwen2 import QWEN2
from swiftmeg.models.family import REGISTRY, HFConfig


def to_args(config: HFConfig) -> dict[str, Any]:
    """Every query and key head is normalised; head_dim is independent of hidden_size."""
    attention_bias = config.get("attention_bias", False)
    return dense_args(config, windows=True) | {
        "qk_layernorm": True,
        "add_qkv_bias": attention_bias,
        "attention_output_bias": attention_bias,
    }


QWEN3 = REGISTRY.add(QWEN2.variant("Qwen3ForCausalLM", to_args))
