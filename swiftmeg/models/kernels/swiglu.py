"""SwiGLU (arXiv:2002.05202): silu(gate) * up, where gate and up are the halves of one tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmeg.models.kernels import use_triton


def swiglu(x: Tensor) -> Tensor:
    """Multiply silu of the first half of `x` [..., 2f] by its second half: [..., f]."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return backward(x, grad)[0]


def forward(x: Tensor) -> Tensor:
    """Return SwiGLU of `x` [..., 2f], computed in fp32: [..., f] in x's dtype."""
    if use_triton(x):
        from swiftmeg.models.kernels import triton_swiglu

        return triton_swiglu.forward(x)
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def backward(x: Tensor, grad: Tensor, recompute: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of `x` [..., 2f] for that of the output, `grad` [..., f].

    With `recompute` also the output itself, which the forward pass then need not keep.
    """
    if use_triton(x):
        from swiftmeg.models.kernels import triton_swiglu

        return triton_swiglu.backward(x, grad, recompute)
    gate, up = x.float().chunk(2, dim=-1)
    share = torch.sigmoid(gate)
    silu = gate * share
    slope = share * (1 + gate * (1 - share))
    into = grad.float()
    result = torch.cat([into * up * slope, into * silu], dim=-1).to(x.dtype)
    return result, (silu * up).to(x.dtype) if recompute else None
