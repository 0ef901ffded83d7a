"""Splitting, norming and rotating of query, key and value heads in Triton, a token a program."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from swiftmeg.models.kernels.qkv import HeadNorm, Heads, Rotation


@triton.jit
def _places(
    token, tokens, groups, queries, size, heads_block: tl.constexpr, split_in_one: tl.constexpr
):
    """Where the heads of a token begin in their own tensors, and of which kind they are.

    The tensors of queries, keys and values follow each other if `split_in_one`.
    """
    head = tl.arange(0, heads_block)[:, None]
    group = head // (queries + 2)
    number = head % (queries + 2)
    is_key = number == queries
    is_value = number == queries + 1
    all_queries = groups * queries
    place = token * all_queries + group * queries + number
    other = token * groups + group
    keys = tokens * all_queries if split_in_one else 0
    values = tokens * (all_queries + groups) if split_in_one else 0
    place = tl.where(is_key, keys + other, place)
    place = tl.where(is_value, values + other, place)
    return head, head < groups * (queries + 2), is_key, is_value, place * size


@triton.jit
def _forward(
    mixed,
    out,
    positions,
    cosine,
    sine,
    query_weight,
    key_weight,
    tokens,
    stride,
    groups,
    queries,
    size,
    half,
    eps,
    offset,
    interleaved: tl.constexpr,
    normed: tl.constexpr,
    heads_block: tl.constexpr,
    half_block: tl.constexpr,
    rest_block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, there, is_key, is_value, place = _places(
        token, tokens, groups, queries, size, heads_block, True
    )
    pair = tl.arange(0, half_block)[None, :]
    position = tl.load(positions + token).to(tl.int64)
    c = tl.load(cosine + position * half + pair, pair < half, other=1.0)
    s = tl.load(sine + position * half + pair, pair < half, other=0.0)
    c = tl.where(is_value, 1.0, c)
    s = tl.where(is_value, 0.0, s)
    one = 2 * pair if interleaved else pair
    two = 2 * pair + 1 if interleaved else pair + half
    inside = there & (pair < half)
    read = mixed + token * stride + head * size
    first = tl.load(read + one, inside, other=0.0).to(tl.float32)
    second = tl.load(read + two, inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    if rest_block > 0:
        entry = 2 * half + tl.arange(0, rest_block)[None, :]
        beyond = there & (entry < size)
        rest = tl.load(read + entry, beyond, other=0.0).to(tl.float32)
    if normed:
        squares = tl.sum(first * first + second * second, 1)
        if rest_block > 0:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / size + eps)[:, None]
        known = (pair < half) & ~is_value
        w1 = tl.load(query_weight + one, known & ~is_key, other=0.0).to(tl.float32)
        w1 += tl.load(key_weight + one, known & is_key, other=0.0).to(tl.float32)
        w2 = tl.load(query_weight + two, known & ~is_key, other=0.0).to(tl.float32)
        w2 += tl.load(key_weight + two, known & is_key, other=0.0).to(tl.float32)
        first = tl.where(is_value, first, first * scale * (w1 + offset))
        second = tl.where(is_value, second, second * scale * (w2 + offset))
        if rest_block > 0:
            whole = (entry < size) & ~is_value
            w3 = tl.load(query_weight + entry, whole & ~is_key, other=0.0).to(tl.float32)
            w3 += tl.load(key_weight + entry, whole & is_key, other=0.0).to(tl.float32)
            rest = tl.where(is_value, rest, rest * scale * (w3 + offset))
    tl.store(out + place + one, (first * c - second * s).to(kind), inside)
    tl.store(out + place + two, (second * c + first * s).to(kind), inside)
    if rest_block > 0:
        tl.store(out + place + entry, rest.to(kind), beyond)


@triton.jit
def _gathered(query, key, value, place, index, inside, is_key, is_value):
    x = tl.load(query + place + index, inside & ~is_key & ~is_value, other=0.0).to(tl.float32)
    x += tl.load(key + place + index, inside & is_key, other=0.0).to(tl.float32)
    x += tl.load(value + place + index, inside & is_value, other=0.0).to(tl.float32)
    return x


@triton.jit
def _backward(
    query,
    key,
    value,
    mixed,
    into,
    positions,
    cosine,
    sine,
    query_weight,
    key_weight,
    query_parts,
    key_parts,
    tokens,
    stride,
    groups,
    queries,
    size,
    half,
    eps,
    offset,
    interleaved: tl.constexpr,
    normed: tl.constexpr,
    heads_block: tl.constexpr,
    half_block: tl.constexpr,
    rest_block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, there, is_key, is_value, place = _places(
        token, tokens, groups, queries, size, heads_block, False
    )
    pair = tl.arange(0, half_block)[None, :]
    position = tl.load(positions + token).to(tl.int64)
    c = tl.load(cosine + position * half + pair, pair < half, other=1.0)
    s = tl.load(sine + position * half + pair, pair < half, other=0.0)
    c = tl.where(is_value, 1.0, c)
    s = tl.where(is_value, 0.0, s)
    one = 2 * pair if interleaved else pair
    two = 2 * pair + 1 if interleaved else pair + half
    inside = there & (pair < half)
    grad1 = _gathered(query, key, value, place, one, inside, is_key, is_value)
    grad2 = _gathered(query, key, value, place, two, inside, is_key, is_value)
    first = grad1 * c + grad2 * s
    second = grad2 * c - grad1 * s
    if rest_block > 0:
        entry = 2 * half + tl.arange(0, rest_block)[None, :]
        beyond = there & (entry < size)
        rest = _gathered(query, key, value, place, entry, beyond, is_key, is_value)
    if normed:
        read = mixed + token * stride + head * size
        x1 = tl.load(read + one, inside, other=0.0).to(tl.float32)
        x2 = tl.load(read + two, inside, other=0.0).to(tl.float32)
        squares = tl.sum(x1 * x1 + x2 * x2, 1)
        if rest_block > 0:
            x3 = tl.load(read + entry, beyond, other=0.0).to(tl.float32)
            squares += tl.sum(x3 * x3, 1)
        scale = tl.rsqrt(squares / size + eps)[:, None]
        x1 *= scale
        x2 *= scale
        is_query = there & ~is_key & ~is_value
        keys = there & is_key
        known = (pair < half) & ~is_value
        w1 = tl.load(query_weight + one, known & ~is_key, other=0.0).to(tl.float32)
        w1 += tl.load(key_weight + one, known & is_key, other=0.0).to(tl.float32)
        w2 = tl.load(query_weight + two, known & ~is_key, other=0.0).to(tl.float32)
        w2 += tl.load(key_weight + two, known & is_key, other=0.0).to(tl.float32)
        w1 = first * (w1 + offset)
        w2 = second * (w2 + offset)
        mean = tl.sum(w1 * x1 + w2 * x2, 1)
        parts = tl.arange(0, half_block)
        low = 2 * parts if interleaved else parts
        high = 2 * parts + 1 if interleaved else parts + half
        row = token * size
        share1, share2 = first * x1, second * x2
        some = parts < half
        tl.store(query_parts + row + low, tl.sum(tl.where(is_query, share1, 0.0), 0), some)
        tl.store(query_parts + row + high, tl.sum(tl.where(is_query, share2, 0.0), 0), some)
        tl.store(key_parts + row + low, tl.sum(tl.where(keys, share1, 0.0), 0), some)
        tl.store(key_parts + row + high, tl.sum(tl.where(keys, share2, 0.0), 0), some)
        if rest_block > 0:
            x3 *= scale
            whole = (entry < size) & ~is_value
            w3 = tl.load(query_weight + entry, whole & ~is_key, other=0.0).to(tl.float32)
            w3 += tl.load(key_weight + entry, whole & is_key, other=0.0).to(tl.float32)
            w3 = rest * (w3 + offset)
            mean += tl.sum(w3 * x3, 1)
            last = 2 * half + tl.arange(0, rest_block)
            of_queries = tl.sum(tl.where(is_query, rest * x3, 0.0), 0)
            tl.store(query_parts + row + last, of_queries, last < size)
            tl.store(key_parts + row + last, tl.sum(tl.where(keys, rest * x3, 0.0), 0), last < size)
            rest = tl.where(is_value, rest, scale * (w3 - x3 * mean[:, None] / size))
        first = tl.where(is_value, first, scale * (w1 - x1 * mean[:, None] / size))
        second = tl.where(is_value, second, scale * (w2 - x2 * mean[:, None] / size))
    kind = into.dtype.element_ty
    write = into + token * groups * (queries + 2) * size + head * size
    tl.store(write + one, first.to(kind), inside)
    tl.store(write + two, second.to(kind), inside)
    if rest_block > 0:
        tl.store(write + entry, rest.to(kind), beyond)


def _blocks(heads: "Heads", rotation: "Rotation") -> dict[str, int]:
    half = rotation.cosine.shape[1]
    rest = heads.size - 2 * half
    return {
        "heads_block": triton.next_power_of_2(heads.groups * (heads.queries + 2)),
        "half_block": triton.next_power_of_2(half),
        "rest_block": triton.next_power_of_2(rest) if rest else 0,
        "num_warps": 8 if heads.groups * heads.queries * half >= 2048 else 4,
    }


def forward(
    mixed: Tensor, heads: "Heads", rotation: "Rotation", norm: "HeadNorm | None"
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qkv.split_and_rotate`; the results lie one behind the other."""
    if mixed.stride(-1) != 1:
        mixed = mixed.contiguous()
    tokens, queries, keys = len(mixed), heads.groups * heads.queries, heads.groups
    out = mixed.new_empty(tokens * (queries + 2 * keys) * heads.size)
    positions, cosine, sine, interleaved = rotation
    if tokens:
        weights = (cosine, sine) if norm is None else (norm.query, norm.key)
        _forward[(tokens,)](
            mixed,
            out,
            positions,
            cosine,
            sine,
            *weights,
            tokens,
            mixed.stride(0),
            *heads,
            cosine.shape[1],
            norm.eps if norm else 0.0,
            norm.offset if norm else 0.0,
            interleaved,
            norm is not None,
            **_blocks(heads, rotation),
        )
    sizes = [tokens * count * heads.size for count in (queries, keys, keys)]
    query, key, value = (part.view(tokens, -1, heads.size) for part in out.split(sizes))
    return query, key, value


def backward(
    grads: tuple[Tensor, ...],
    mixed: Tensor | None,
    heads: "Heads",
    rotation: "Rotation",
    norm: "HeadNorm | None",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `mixed` and of the norms' weights, for those of queries, keys and values."""
    query, key, value = (grad.contiguous() for grad in grads)
    tokens = len(query)
    into = query.new_empty(tokens, heads.groups * (heads.queries + 2) * heads.size)
    positions, cosine, sine, interleaved = rotation
    parts = [cosine, cosine]
    if norm is not None:
        shape = (tokens, heads.size)
        parts = [torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2)]
    if tokens:
        weights = (cosine, sine) if norm is None else (norm.query, norm.key)
        _backward[(tokens,)](
            query,
            key,
            value,
            query if mixed is None else mixed,
            into,
            positions,
            cosine,
            sine,
            *weights,
            *parts,
            tokens,
            0 if mixed is None else mixed.stride(0),
            *heads,
            cosine.shape[1],
            norm.eps if norm else 0.0,
            norm.offset if norm else 0.0,
            interleaved,
            norm is not None,
            **_blocks(heads, rotation),
        )
    if norm is None:
        return into, None, None
    of_query, of_key = (part.sum(0) for part in parts)
    return into, of_query.to(norm.query.dtype), of_key.to(norm.key.dtype)
