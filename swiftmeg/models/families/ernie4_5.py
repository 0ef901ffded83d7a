"""Ernie4_5ForCausalLM: the dense ERNIE 4.5."""

from typing import Any

from swiftmeg.models.arguments import dense_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig


def to_args(config: HFConfig) -> dict[str, Any]:
    """RoPE turns neighbouring pairs; `use_bias` covers every projection."""
    bias = config.get("use_bias", False)
    return dense_args(config) | {
        "rotary_interleaved": True,
        "add_qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bias,
    }


ERNIE4_5 = REGISTRY.add(LLAMA.variant("Ernie4_5ForCausalLM", to_args))
REGISTRY.add(LLAMA.variant("Ernie4_5_ForCausalLM", to_args))
