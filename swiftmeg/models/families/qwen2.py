"""Qwen2ForCausalLM: Qwen2, Qwen2.5, QwQ."""

from typing import Any

from swiftmeg.models.arguments import dense_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig


def to_args(config: HFConfig) -> dict[str, Any]:
    """Query, key and value always have biases; config.json does not say so."""
    return dense_args(config, windows=True) | {"add_qkv_bias": True}


QWEN2 = REGISTRY.add(LLAMA.variant("Qwen2ForCausalLM", to_args))
