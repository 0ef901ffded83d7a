"""Qwen2ForCausalLM: Qwen2, Qwen2.5, QwQ."""

from typing import Any

from swiftmeg.errors import UserError
from swiftmeg.models.arguments import dense_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig


def refuse_sliding_window(config: HFConfig) -> None:
    """UserError for configs that attend through a window in some layers."""
    if config.get("use_sliding_window"):
        raise UserError(
            "config.json: use_sliding_window=true is not supported: set it to false to train "
            "with full attention"
        )


def to_args(config: HFConfig) -> dict[str, Any]:
    """Query, key and value always have biases; config.json does not say so."""
    refuse_sliding_window(config)
    return dense_args(config) | {"add_qkv_bias": True}


QWEN2 = REGISTRY.add(LLAMA.variant("Qwen2ForCausalLM", to_args))
