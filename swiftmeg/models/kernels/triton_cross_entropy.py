"""Cross entropy over blocks of logits in Triton: one read for the sums, one pass for gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _row_sums(logits, labels, out, rows, stride, limit, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    largest = -float("inf")
    total = 0.0
    squares = 0.0
    weighted = 0.0
    plain = 0.0
    for start in range(0, limit, block):
        columns = start + tl.arange(0, block)
        inside = columns < limit
        x = tl.load(logits + row * stride + columns, inside, other=0.0).to(tl.float32)
        plain += tl.sum(tl.where(inside, x, 0.0), 0)
        now = tl.maximum(largest, tl.max(tl.where(inside, x, -float("inf")), 0))
        shrink = tl.exp(largest - now)
        share = tl.where(inside, tl.exp(x - now), 0.0)
        total = total * shrink + tl.sum(share, 0)
        squares = squares * shrink * shrink + tl.sum(share * share, 0)
        weighted = weighted * shrink + tl.sum(share * x, 0)
        largest = now
    here = (label >= 0) & (label < limit)
    target = tl.load(logits + row * stride + label, here, other=0.0).to(tl.float32)
    tl.store(out + row, largest)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, squares)
    tl.store(out + 3 * rows + row, weighted)
    tl.store(out + 4 * rows + row, plain)
    tl.store(out + 5 * rows + row, target)


@triton.jit
def _gradient(logits, labels, log_total, grad, stride, width, limit, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    place = logits + row * stride + columns
    x = tl.load(place, columns < limit, other=0.0).to(tl.float32)
    share = tl.exp(x - tl.load(log_total + row))
    share -= tl.where(columns == tl.load(labels + row), 1.0, 0.0)
    value = tl.where(columns < limit, share * tl.load(grad + row), 0.0)
    tl.store(place, value.to(logits.dtype.element_ty), columns < width)


def row_sums(logits: Tensor, labels: Tensor, limit: int) -> Tensor:
    """The fields of `cross_entropy.RowSums`, fp32 [6, t]."""
    rows = logits.shape[0]
    out = torch.empty(6, rows, dtype=torch.float32, device=logits.device)
    if rows:
        _row_sums[(rows,)](logits, labels, out, rows, logits.stride(0), limit, _BLOCK, num_warps=8)
    return out


def gradient_(logits: Tensor, labels: Tensor, log_total: Tensor, grad: Tensor, limit: int) -> None:
    """See `cross_entropy.gradient_`."""
    rows, width = logits.shape
    if rows:
        grid = (rows, triton.cdiv(width, _BLOCK))
        _gradient[grid](
            logits, labels, log_total, grad, logits.stride(0), width, limit, _BLOCK, num_warps=8
        )
