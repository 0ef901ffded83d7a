"""From the output of the query-key-value projection to heads that attention takes, in one step."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftmeg.models.kernels import use_triton


class Heads(NamedTuple):
    """How heads lie in the projection's output [t, groups * (queries + 2) * size]."""

    groups: int
    """Groups of query heads, a key and a value."""
    queries: int
    """Query heads of a group."""
    size: int
    """Entries of a head."""


class Rotation(NamedTuple):
    """Rotary embeddings: positions [t], fp32 tables [longest, n / 2], and how pairs lie.

    Rotated together are entries 2i and 2i + 1 if `interleaved`, else i and i + n / 2.
    """

    positions: Tensor
    cosine: Tensor
    sine: Tensor
    interleaved: bool


class HeadNorm(NamedTuple):
    """Root-mean-square norms of each query and key head before they are rotated."""

    query: Tensor
    """Weight [size]."""
    key: Tensor
    eps: float
    offset: float
    """Added to the weights: 1 where they are stored as what they differ from one by."""


def split_and_rotate(
    mixed: Tensor, heads: Heads, rotation: Rotation, norm: HeadNorm | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [t, groups * queries, size], and keys and values [t, groups, size].

    `mixed` [t, groups * (queries + 2) * size] holds a group's query heads, its key and its value,
    one group after the other. Queries and keys are normed and rotated, in fp32.
    """
    weights = (None, None) if norm is None else (norm.query, norm.key)
    return _Split.apply(mixed, *weights, heads, rotation, norm)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        heads: Heads,
        rotation: Rotation,
        norm: HeadNorm | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.heads, ctx.rotation, ctx.norm = heads, rotation, norm
        ctx.save_for_backward(*([] if norm is None else [mixed]))
        if use_triton(mixed):
            from swiftmeg.models.kernels import triton_qkv

            return triton_qkv.forward(mixed, heads, rotation, norm)
        query, key, value = _views(mixed, heads)
        if norm is not None:
            query, _ = _normed(query, norm.query, norm)
            key, _ = _normed(key, norm.key, norm)
        query, key = (_rotated(each, rotation, 1).to(mixed.dtype) for each in (query, key))
        return query, key, value.flatten(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads, rotation, norm = ctx.heads, ctx.rotation, ctx.norm
        mixed = ctx.saved_tensors[0] if norm is not None else None
        if use_triton(grads[0]):
            from swiftmeg.models.kernels import triton_qkv

            into, query_weight, key_weight = triton_qkv.backward(
                grads, mixed, heads, rotation, norm
            )
            return into, query_weight, key_weight, None, None, None
        into = grads[0].new_empty(len(grads[0]), heads.groups * (heads.queries + 2) * heads.size)
        parts = _views(into, heads)
        weights: list[Tensor | None] = [None, None]
        for number, grad in enumerate(grads[:2]):
            turned = _rotated(grad, rotation, -1)
            if norm is not None:
                assert mixed is not None
                turned, weights[number] = _norm_backward(
                    _views(mixed, heads)[number], turned, norm[number], norm
                )
            parts[number].copy_(turned.view(parts[number].shape))
        parts[2].copy_(grads[2][:, :, None])
        return into, *weights, None, None, None


def _views(mixed: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [t, groups, queries, size], keys and values [t, groups, 1, size] as views."""
    grouped = mixed.view(len(mixed), heads.groups, heads.queries + 2, heads.size)
    return grouped.split([heads.queries, 1, 1], dim=2)


def _normed(x: Tensor, weight: Tensor, norm: HeadNorm) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
    return x.float() * scale * (weight.float() + norm.offset), scale


def _norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor, norm: HeadNorm
) -> tuple[Tensor, Tensor]:
    """Gradients of x [t, groups, n, size] and of the weight [size]."""
    _, scale = _normed(x, weight, norm)
    grad = grad.view(x.shape)
    unit = x.float() * scale
    into = grad * (weight.float() + norm.offset)
    back = scale * (into - unit * (into * unit).mean(-1, keepdim=True))
    return back, (grad * unit).sum((0, 1, 2)).to(weight.dtype)


def _rotated(x: Tensor, rotation: Rotation, sign: int) -> Tensor:
    """x [t, ..., size] as heads [t, n, size], rotated, fp32."""
    x = x.flatten(1, -2).float()
    positions, cosine, sine, interleaved = rotation
    width = 2 * cosine.shape[1]
    cosine, sine = cosine[positions][:, None], sign * sine[positions][:, None]
    head, rest = x[..., :width], x[..., width:]
    one, two = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    pair = (one * cosine - two * sine, two * cosine + one * sine)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([rotated, rest], dim=-1)
