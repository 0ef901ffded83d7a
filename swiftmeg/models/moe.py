"""Mixture of experts: the layer and its router, over either layer backend."""

from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """Megatron's top-k router."""


class MoELayer(MegatronMoELayer):
    """Megatron's layer of experts."""
