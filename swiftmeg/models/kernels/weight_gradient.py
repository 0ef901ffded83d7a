"""Weight gradients that are added to Megatron's buffers by the product that computes them."""

from typing import Any

import torch
from torch import Tensor


def has_buffer(weight: Tensor) -> bool:
    """Whether `weight` has a buffer of Megatron's data-parallel wrapper to add gradients to."""
    return hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")


def add_product(buffer: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad.T @ x to `buffer` [out, in], for `grad` [t, out] and `x` [t, in].

    One product with an fp32 sum where the GPU's library has it: bf16 factors and an fp32 buffer.
    """
    if buffer.dtype == grad.dtype:
        torch.addmm(buffer, grad.t(), x, out=buffer)
    elif buffer.is_cuda and buffer.dtype == torch.float32:
        torch.addmm(buffer, grad.t(), x, out_dtype=torch.float32, out=buffer)
    else:
        buffer.add_(grad.t().to(buffer.dtype) @ x.to(buffer.dtype))


def placeholder(weight: Any) -> Tensor:
    """Return what autograd is to hand on for a `weight` whose gradient its buffer has already.

    A tensor without meaning that makes Megatron's hook run; zeros where the embedding shares the
    weight, because autograd adds both gradients up.
    """
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)
