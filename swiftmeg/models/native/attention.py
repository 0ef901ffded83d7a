"""Attention between the projections, of the native backend."""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class DotProductAttention(MegatronModule):
    """Causal attention over grouped queries, for padded batches and packed sequences."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Batches: query [s, b, heads, d], key [s, b, groups, d] and value [s, b, groups, v] give
        [s, b, heads * v]; `attention_mask` [b or 1, 1, s, s] is True where attention is forbidden,
        None means causal. Packed: query [t, heads, d], key [t, groups, d] and value [t, groups, v]
        give [t, heads * v]; position i attends to earlier positions of its own segment of
        `packed_seq_params.cu_seqlens_q`.
        """
        repeats = query.shape[-2] // key.shape[-2]
        if repeats > 1:
            key = key.repeat_interleave(repeats, dim=-2)
            value = value.repeat_interleave(repeats, dim=-2)
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            return self._packed(query, key, value, packed_seq_params).flatten(-2)
        mask = None if attention_mask is None else ~attention_mask
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return self._attend(q, k, v, mask).permute(2, 0, 1, 3).flatten(-2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not self._drops():
            from torch.nn.attention.varlen import varlen_attn

            bounds, longest = packed.cu_seqlens_q, int(packed.max_seqlen_q)
            return varlen_attn(  # type: ignore[return-value]
                query,
                key,
                value,
                bounds,
                bounds,
                longest,
                longest,
                scale=self.scale,
                window_size=(-1, 0),
            )
        bounds = packed.cu_seqlens_q.tolist()
        out = []
        for start, end in pairwise(bounds):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            out.append(self._attend(q, k, v, None)[0].transpose(0, 1))
        return torch.cat(out)

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Batched attention over [b, heads, s, d]."""
        options: dict[str, Any] = {
            "attn_mask": mask,
            "is_causal": mask is None,
            "scale": self.scale,
        }
        if not self._drops():
            return F.scaled_dot_product_attention(q, k, v, **options)
        # Heads are split over tensor-parallel ranks, so each rank draws masks of its own.
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, **options)
