"""SwiGLU in Triton: one pass over memory in each direction."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _forward(x, out, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    gate = tl.load(x + row * 2 * width + columns, inside).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, inside).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), inside)


@triton.jit
def _backward(x, grad, grad_x, out, width, recompute: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    gate = tl.load(x + row * 2 * width + columns, inside).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, inside).to(tl.float32)
    into = tl.load(grad + row * width + columns, inside).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    kind = grad_x.dtype.element_ty
    slope = share * (1 + gate * (1 - share))
    tl.store(grad_x + row * 2 * width + columns, (into * up * slope).to(kind), inside)
    tl.store(grad_x + row * 2 * width + width + columns, (into * silu).to(kind), inside)
    if recompute:
        tl.store(out + row * width + columns, (silu * up).to(kind), inside)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, _BLOCK)


def forward(x: Tensor) -> Tensor:
    """SwiGLU of x [..., 2f]: [..., f]."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    if out.numel():
        _forward[_grid(out.numel() // width, width)](x, out, width, _BLOCK)
    return out


def backward(x: Tensor, grad: Tensor, recompute: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of x [..., 2f] and, with `recompute`, the output [..., f]."""
    x, grad = x.contiguous(), grad.contiguous()
    width = x.shape[-1] // 2
    grad_x = torch.empty_like(x)
    out = torch.empty_like(grad, dtype=x.dtype) if recompute else None
    if grad.numel():
        _backward[_grid(grad.numel() // width, width)](
            x, grad, grad_x, out, width, recompute, _BLOCK
        )
    return grad_x, out
