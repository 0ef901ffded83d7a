"""Causal attention over the segments of a pack by one kernel: flash-attn-4's or torch's own."""

import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Where the segments of queries and of keys begin: int32 [segments + 1], and the longest."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


@cache
def has_flash_attention_4() -> bool:
    """Whether flash-attn-4 is installed, on a GPU that it is made for (Hopper or newer)."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        return False
    if importlib.util.find_spec("flash_attn") is None:
        return False
    return importlib.util.find_spec("flash_attn.cute") is not None


def flash_attention_4(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> Tensor:
    """Return [t, heads, v] for query [t, heads, d], key [u, groups, d] and value [u, groups, v].

    The last query of a segment sees its last key; `window` says how many keys before its own a
    query sees. The kernel is compiled once for each head size, which takes some seconds, and kept.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    from flash_attn.cute import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=segments.queries,
        cu_seqlens_k=segments.keys,
        max_seqlen_q=segments.longest_query,
        max_seqlen_k=segments.longest_key,
        softmax_scale=scale,
        causal=True,
        window_size=(window, None if window is None else 0),
        deterministic=deterministic,
    )
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> Tensor:
    """As `flash_attention_4`, for as many key heads as query heads and values of the keys' size."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(  # type: ignore[return-value]
        query, key, value, *segments, scale=scale, window_size=(-1 if window is None else window, 0)
    )
