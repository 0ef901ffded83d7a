"""Olmo3ForCausalLM: OLMo 3."""

from typing import Any

from swiftmeg.models.arguments import rope_type, ropes
from swiftmeg.models.families import olmo2
from swiftmeg.models.family import REGISTRY, HFConfig


def to_args(config: HFConfig) -> dict[str, Any]:
    """OLMo 2 whose layers attend in windows but for every fourth; RoPE is scaled in those alone."""
    kinds = ropes(config)
    for kind in kinds:
        rope_type(config, kind)
    shared = kinds.get("full_attention") or next(iter(kinds.values()))
    return olmo2.to_args(config | {"rope_parameters": shared}, windows=True)


OLMO3 = REGISTRY.add(olmo2.OLMO2.variant("Olmo3ForCausalLM", to_args))
