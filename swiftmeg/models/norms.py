"""Norms in places where Megatron has none, over either layer backend."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class NormAfterLayer(TransformerLayer):
    """A layer that norms what attention and MLP add to the residual stream.

    `norm` builds `post_self_attn_layernorm` and `post_mlp_layernorm`.
    """

    def __init__(self, config: TransformerConfig, *args: Any, norm: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.post_self_attn_layernorm = norm(config=config, hidden_size=size, eps=eps)
        self.post_mlp_layernorm = norm(config=config, hidden_size=size, eps=eps)
        layer: Any = self  # Megatron gives these attributes no types
        layer.self_attn_bda = _normed(self.post_self_attn_layernorm, layer.self_attn_bda)
        layer.mlp_bda = _normed(self.post_mlp_layernorm, layer.mlp_bda)


def _normed(norm: torch.nn.Module, bias_dropout_add: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's sum of bias, dropout and residual, with `norm` before the dropout."""

    def choose(training: bool, fused: bool) -> Callable[..., Tensor]:
        add = bias_dropout_add(training, fused)

        def apply(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = output
            x = norm(x if bias is None else x + bias)
            return add((x, None), residual, dropout)

        return apply

    return choose


class NormAcrossHeads(torch.nn.Module):
    """Root-mean-square norm of queries or keys over all heads together.

    Tensor parallelism cuts the heads, so the sum of squares goes over ranks. `weight`
    [heads * head size] is whole on every rank; Megatron sums the gradients of what is called
    `q_layernorm` or `k_layernorm` over them. Where there are more ranks than key heads, several
    hold the same head.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int
    ) -> None:
        super().__init__()
        self.eps = eps
        self.heads = heads
        self.weight = torch.nn.Parameter(
            torch.ones(
                heads * hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape [s, b, heads here, head size], computed in fp32."""
        group = mpu.get_tensor_model_parallel_group()
        here = x.shape[-2]
        first = group.rank() * self.heads // group.size()
        held = self.weight.unflatten(0, (self.heads, -1))[first : first + here]
        wide = x.float()
        square = wide.square().sum(dim=(-2, -1), keepdim=True)
        square = reduce_from_tensor_model_parallel_region(square, group=group)
        square = copy_to_tensor_model_parallel_region(square, group=group)
        # Each head counts as often as there are ranks that hold it.
        mean = square / (here * group.size() * x.shape[-1])
        return (wide * (mean + self.eps).rsqrt() * held).to(x.dtype)
