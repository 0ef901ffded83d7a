"""Rotary position embedding in Triton: all heads of a token in one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x,
    out,
    positions,
    cosine,
    sine,
    token_stride,
    head_stride,
    heads,
    size,
    half,
    sign,
    reads_pairs: tl.constexpr,
    writes_pairs: tl.constexpr,
    heads_block: tl.constexpr,
    half_block: tl.constexpr,
    rest_block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, heads_block)[:, None]
    pair = tl.arange(0, half_block)[None, :]
    inside = (head < heads) & (pair < half)
    position = tl.load(positions + token).to(tl.int64)
    c = tl.load(cosine + position * half + pair, pair < half, other=1.0)
    s = tl.load(sine + position * half + pair, pair < half, other=0.0) * sign
    if reads_pairs:
        one, two = 2 * pair, 2 * pair + 1
    else:
        one, two = pair, pair + half
    read = x + token * token_stride + head * head_stride
    write = out + token * heads * size + head * size
    first = tl.load(read + one, inside, other=0.0).to(tl.float32)
    second = tl.load(read + two, inside, other=0.0).to(tl.float32)
    if writes_pairs:
        one, two = 2 * pair, 2 * pair + 1
    else:
        one, two = pair, pair + half
    kind = out.dtype.element_ty
    tl.store(write + one, (first * c - second * s).to(kind), inside)
    tl.store(write + two, (second * c + first * s).to(kind), inside)
    if rest_block > 0:
        entry = 2 * half + tl.arange(0, rest_block)[None, :]
        beyond = (head < heads) & (entry < size)
        tl.store(write + entry, tl.load(read + entry, beyond, other=0.0), beyond)


def rotate(
    x: Tensor,
    positions: Tensor,
    cosine: Tensor,
    sine: Tensor,
    reads_pairs: bool,
    writes_pairs: bool,
    sign: int,
) -> Tensor:
    """See `rope.rotate`; with `sign` -1 the inverse, if pairs lie likewise."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens, heads, size = x.shape
    half = cosine.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens:
        rest = size - 2 * half
        _rotate[(tokens,)](
            x,
            out,
            positions,
            cosine,
            sine,
            x.stride(0),
            x.stride(1),
            heads,
            size,
            half,
            sign,
            reads_pairs,
            writes_pairs,
            triton.next_power_of_2(heads),
            triton.next_power_of_2(half),
            triton.next_power_of_2(rest) if rest else 0,
            num_warps=4 if heads * half >= 512 else 1,
        )
    return out
