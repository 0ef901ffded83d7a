"""MistralForCausalLM: Mistral 7B from v0.2, Mistral Nemo and Small."""

from typing import Any

from swiftmeg.errors import UserError
from swiftmeg.models.arguments import dense_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig


def refuse_window(config: HFConfig) -> None:
    """UserError for configs that attend through a window in every layer."""
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        raise UserError(
            f"config.json: sliding_window={window} is not supported: set it to null to train with "
            "full attention"
        )


def to_args(config: HFConfig) -> dict[str, Any]:
    """Llama without biases."""
    refuse_window(config)
    return dense_args(config)


MISTRAL = REGISTRY.add(LLAMA.variant("MistralForCausalLM", to_args))
