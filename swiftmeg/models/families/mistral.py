"""MistralForCausalLM: Mistral 7B, Nemo and Small."""

from typing import Any

from swiftmeg.models.arguments import dense_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig


def to_args(config: HFConfig) -> dict[str, Any]:
    """Llama without biases; all layers attend in a window if there is one."""
    return dense_args(config, windows=True)


MISTRAL = REGISTRY.add(LLAMA.variant("MistralForCausalLM", to_args))
