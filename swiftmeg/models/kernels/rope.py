"""Rotary position embedding (arXiv:2104.09864) of a pack's heads, by tables of cosine and sine."""

from typing import Any

import torch
from torch import Tensor

from swiftmeg.models.kernels import use_triton


def rotate(
    x: Tensor,
    positions: Tensor,
    cosine: Tensor,
    sine: Tensor,
    *,
    reads_pairs: bool,
    writes_pairs: bool,
) -> Tensor:
    """Apply rotary embeddings to heads `x` [t, heads, d] at `positions` [t].

    `cosine` and `sine` [longest, n / 2] are fp32 tables; the first n entries of each head are
    rotated. Two that are rotated together are 2i and 2i + 1 of x if `reads_pairs`, else i and
    i + n / 2, and likewise of the result by `writes_pairs`.
    """
    return _Rotate.apply(x, positions, cosine, sine, reads_pairs, writes_pairs)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        positions: Tensor,
        cosine: Tensor,
        sine: Tensor,
        reads_pairs: bool,
        writes_pairs: bool,
    ) -> Tensor:
        ctx.save_for_backward(positions, cosine, sine)
        ctx.order = (reads_pairs, writes_pairs)
        return _apply(x, positions, cosine, sine, reads_pairs, writes_pairs, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        positions, cosine, sine = ctx.saved_tensors
        reads_pairs, writes_pairs = ctx.order
        back = _apply(grad, positions, cosine, sine, writes_pairs, reads_pairs, -1)
        return back, None, None, None, None, None


def _apply(
    x: Tensor,
    positions: Tensor,
    cosine: Tensor,
    sine: Tensor,
    reads_pairs: bool,
    writes_pairs: bool,
    sign: int,
) -> Tensor:
    if use_triton(x):
        from swiftmeg.models.kernels import triton_rope

        return triton_rope.rotate(x, positions, cosine, sine, reads_pairs, writes_pairs, sign)
    width = 2 * cosine.shape[1]
    cosine, sine = cosine[positions][:, None], sign * sine[positions][:, None]
    head, rest = x[..., :width].float(), x[..., width:]
    one, two = (head[..., 0::2], head[..., 1::2]) if reads_pairs else head.chunk(2, dim=-1)
    pair = (one * cosine - two * sine, two * cosine + one * sine)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if writes_pairs else torch.cat(pair, dim=-1)
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)
