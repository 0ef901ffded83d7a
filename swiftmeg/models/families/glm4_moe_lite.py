"""Glm4MoeLiteForCausalLM: GLM-4.7-Flash."""

from typing import Any

from swiftmeg.models.families import deepseek_v3
from swiftmeg.models.family import REGISTRY, HFConfig


def to_args(config: HFConfig) -> dict[str, Any]:
    """DeepSeek-V3's layers, with a list that says which of them have experts."""
    kinds = config["mlp_layer_types"]
    return deepseek_v3.to_args(config) | {"moe_layer_freq": [int(k == "sparse") for k in kinds]}


GLM4_MOE_LITE = REGISTRY.add(
    deepseek_v3.DEEPSEEK_V3.variant("Glm4MoeLiteForCausalLM", to_args, config_class=None)
)
