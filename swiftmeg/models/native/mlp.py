"""The gated MLP of the native backend: SwiGLU and the product behind it as one step."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from swiftmeg.models.kernels import swiglu, weight_gradient


class GatedMLP(MLP):
    """Megatron's MLP whose SwiGLU keeps the gate and up projections alone for the backward pass."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [s, b, h] to [s, b, h], and a bias that is still to be added."""
        config = self.config
        if per_token_scale is not None or not config.gated_linear_unit or config.fp8:
            return super().forward(hidden_states, per_token_scale, **others)
        if config.activation_func is not F.silu or config.activation_func_clamp_value is not None:
            return super().forward(hidden_states, per_token_scale, **others)
        x, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            x = x + bias
        if not isinstance(self.linear_fc2, GatedRowParallelLinear):  # adapters stand around it
            x = swiglu.swiglu(x)
        return self.linear_fc2(x)


class GatedRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel layer, which also takes SwiGLU's input [..., 2f] for its output."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        if input.shape[-1] == weight.shape[1]:
            return super()._forward_impl(input, weight, *args, **options)
        accumulates = self.gradient_accumulation_fusion and weight_gradient.has_buffer(weight)
        return _SwiGLUProduct.apply(input, weight, accumulates)


class _SwiGLUProduct(torch.autograd.Function):
    """swiglu(x) @ weight.T for x [..., 2f] and weight [h, f]; keeps x, computes SwiGLU again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, accumulates: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.accumulates = accumulates
        return swiglu.forward(x) @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1]
        grad_x, product = swiglu.backward(x, grad @ weight, recompute=wants_weight)
        if product is None:
            return grad_x, None, None
        rows, inputs = grad.reshape(-1, grad.shape[-1]), product.reshape(-1, product.shape[-1])
        if ctx.accumulates:
            weight_gradient.add_product(weight.main_grad, rows, inputs)
            return grad_x, weight_gradient.placeholder(weight), None
        return grad_x, rows.t() @ inputs, None
