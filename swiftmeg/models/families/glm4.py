"""Glm4ForCausalLM: GLM-4-0414 and GLM-Z1, 9B and 32B."""

from typing import Any

from swiftmeg.models.families import glm
from swiftmeg.models.family import REGISTRY, HFConfig
from swiftmeg.models.weight_rows import NORM_AFTER_ROWS


def to_args(config: HFConfig) -> dict[str, Any]:
    """GLM with norms before and after attention and MLP."""
    return glm.to_args(config) | {"norm_after": True}


GLM4 = REGISTRY.add(glm.GLM.variant("Glm4ForCausalLM", to_args, NORM_AFTER_ROWS))
