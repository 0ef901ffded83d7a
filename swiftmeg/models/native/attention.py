"""Attention between the projections, of the native backend."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import mpu, parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from swiftmeg.models.attention_kernel import (
    FLASH_ATTENTION_4,
    VARLEN,
    Attention,
    AttentionKernel,
    kernel_for,
)
from swiftmeg.models.context import gather
from swiftmeg.models.kernels.varlen_attention import Segments, flash_attention_4, torch_varlen


class DotProductAttention(MegatronModule):
    """Causal attention over grouped queries, for padded batches and packed sequences.

    In layers that `window_attn_skip_freq` names, a token sees `window_size[0]` tokens before it.
    With the softmax type `learnable`, each head has a sink: one more logit, of no token, that takes
    its share of the softmax (arXiv:2309.17453).

    Under context parallelism a rank gathers the keys and values of all ranks, which with grouped
    queries are a fraction of the activations, and attends from its own chunks. The default
    recomputation of core attention keeps them out of what the backward pass stores.
    """

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
        self.window: int | None = None
        skips = config.window_attn_skip_freq
        if is_layer_window_attention(config.window_size, skips, layer_number):
            assert config.window_size is not None
            self.window = config.window_size[0] + 1
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            self.softmax_offset = self._sinks()
        self.cp_size = config.context_parallel_size
        self.cp_group = pg_collection.cp if pg_collection and self.cp_size > 1 else None

    def _sinks(self) -> torch.nn.Parameter:
        """A logit for each head here."""
        config, size = self.config, mpu.get_tensor_model_parallel_world_size()
        sinks: Any = torch.nn.Parameter(
            torch.zeros(
                config.num_attention_heads // size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        sinks.tensor_model_parallel = True
        sinks.partition_dim, sinks.partition_stride = 0, 1
        return sinks

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The sinks of all heads as one entry."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=mpu.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )

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
        `packed_seq_params.cu_seqlens_q`. Under context parallelism s and t are this rank's places
        (`swiftmeg.models.context`) and the mask must be None.
        """
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if attention_mask is not None and not packed:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, *self._repeat(query, key, value)))
            return self._attend(q, k, v, ~attention_mask).permute(2, 0, 1, 3).flatten(-2)
        if packed:
            assert packed_seq_params is not None
            borders = packed_seq_params.cu_seqlens_q
        else:
            total = len(query) * self.cp_size
            borders = torch.tensor([0, total], dtype=torch.int32, device=query.device)
        if self.cp_size > 1:
            split = [key.shape[-1], value.shape[-1]]
            both = gather(torch.cat([key, value], dim=-1), borders, self._group())
            key, value = both.split(split, dim=-1)
        kernel = self._kernel(query, value, packed)
        if kernel is FLASH_ATTENTION_4:
            return self._varlen(flash_attention_4, query, key, value, packed_seq_params).flatten(-2)
        key, value = self._repeat(query, key, value)
        if kernel is VARLEN:
            return self._varlen(torch_varlen, query, key, value, packed_seq_params).flatten(-2)
        if packed:
            query, key, value = (x[:, None] for x in (query, key, value))
        out = self._segments(query, key, value, borders.tolist())
        return (out[:, 0] if packed else out).flatten(-2)

    def _repeat(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Give every query head a key and a value of its own."""
        repeats = query.shape[-2] // key.shape[-2]
        if repeats == 1:
            return key, value
        return key.repeat_interleave(repeats, dim=-2), value.repeat_interleave(repeats, dim=-2)

    def _group(self) -> Any:
        return self.cp_group or parallel_state.get_context_parallel_group()

    def _chunks(self) -> list[int]:
        """Which of a segment's 2 * CP chunks this rank holds, in order."""
        rank = self._group().rank()
        return [rank, 2 * self.cp_size - 1 - rank]

    def _segments(self, query: Tensor, key: Tensor, value: Tensor, borders: list[int]) -> Tensor:
        """Segment by segment: queries [t / CP, b, heads, d], keys and values [t, b, heads, d]."""
        out = []
        for start, end in pairwise(borders):
            first = start // self.cp_size
            if self.cp_size == 1:
                pieces = [(start, end, end)]
            else:
                size = (end - start) // (2 * self.cp_size)
                pieces = [
                    (first + half * size, first + (half + 1) * size, start + (chunk + 1) * size)
                    for half, chunk in enumerate(self._chunks())
                ]
            for begin, stop, last in pieces:
                parts = (query[begin:stop], key[start:last], value[start:last])
                q, k, v = (x.permute(1, 2, 0, 3) for x in parts)
                out.append(self._attend(q, k, v, None).permute(2, 0, 1, 3))
        return torch.cat(out)

    def _kernel(self, query: Tensor, value: Tensor, packed: bool) -> AttentionKernel:
        """The kernel for queries [..., d] and values [..., v]."""
        return kernel_for(
            Attention(
                backend="native",
                device=query.device.type,
                half=query.dtype in (torch.float16, torch.bfloat16),
                packed=packed,
                key_size=query.shape[-1],
                value_size=value.shape[-1],
                sinks=self.softmax_offset is not None,
                windows=self.window is not None,
                context_parallel=self.cp_size > 1,
                dropout=self._drops(),
            )
        )

    def _varlen(
        self,
        attend: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: PackedSeqParams,
    ) -> Tensor:
        borders = packed.cu_seqlens_q
        q_borders = k_borders = borders
        longest_q = longest_k = int(packed.max_seqlen_q)
        if self.cp_size > 1:
            # Each chunk is a sequence of its own, with all keys up to its end; the kernel aligns
            # the causal mask with the last key.
            early, late = self._chunks()
            size = borders.diff() // (2 * self.cp_size)
            q_lengths = size.repeat_interleave(2)
            k_lengths = torch.stack([(early + 1) * size, (late + 1) * size], dim=1).flatten()
            q_borders, k_borders = _cumulated(q_lengths), _cumulated(k_lengths)
            count = (early + late + 2) * len(query) // 2
            piece = torch.repeat_interleave(k_lengths, output_size=count)
            places = torch.arange(count, device=query.device) - k_borders[piece]
            places = places + borders[:-1].repeat_interleave(2)[piece]
            key, value = key[places], value[places]
            longest_q //= 2 * self.cp_size
            longest_k = longest_q * (late + 1)
        return attend(
            query,
            key,
            value,
            Segments(q_borders, k_borders, longest_q, longest_k),
            scale=self.scale,
            window=None if self.window is None else self.window - 1,
            deterministic=self.config.deterministic_mode,
        )

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Batched attention over [b, heads, s, d]; without a mask the last query sees all keys."""
        missing = k.shape[-2] - q.shape[-2]
        # A window that reaches over all keys needs no mask.
        window = self.window if self.window and self.window < k.shape[-2] else None
        if missing or window or self.softmax_offset is not None:
            seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
            seen = seen.tril(missing)
            if window:
                seen = seen.triu(missing + 1 - window)
            mask = seen if mask is None else mask & seen
        if self.softmax_offset is not None:
            q, k, v, mask = self._with_sinks(q, k, v, mask)
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

    def _with_sinks(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add a key whose logit is the head's sink for every query, and whose value is 0.

        Queries get entries of 1 that only this key multiplies; eight, because kernels like it.
        """
        assert self.softmax_offset is not None
        assert mask is not None
        sinks = (self.softmax_offset / (8 * self.scale)).to(k.dtype)
        sink = F.pad(sinks[:, None, None].expand(-1, 1, 8), (k.shape[-1], 0))
        sink = sink.expand(k.shape[0], -1, -1, -1)
        return (
            F.pad(q, (0, 8), value=1.0),
            torch.cat([sink, F.pad(k, (0, 8))], dim=-2),
            F.pad(v, (0, 0, 1, 0)),
            F.pad(mask, (1, 0), value=True),
        )


def _cumulated(lengths: Tensor) -> Tensor:
    """Borders [n + 1] of segments with `lengths` [n], int32."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
