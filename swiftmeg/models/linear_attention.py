"""Gated delta net (arXiv:2412.06464): attention with a state in place of keys, over either backend.

Key heads are the groups: each serves as many value heads. The input projection, the convolution's
channels and the heads' scalars are in the order of the groups, so tensor and context parallelism
cut them like any other heads.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all, copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from swiftmeg.models.context import held
from swiftmeg.models.native.delta_rule import Chunks, gated_delta_rule

NORM_EPSILON = 1e-6
"""Under the root of the length of queries and keys, in the published kernels and transformers."""


@dataclass
class GatedDeltaNetSubmodules:
    """The projections: `in_proj` is column-parallel, behind or with the layer's norm."""

    in_proj: Any
    out_proj: Any


class GatedNorm(torch.nn.Module):
    """Root-mean-square norm of each value head, times a SiLU gate.

    Every tensor-parallel rank holds `weight` [head size] whole and sees some of the heads.
    """

    def __init__(self, config: TransformerConfig, size: int, group: Any) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.group = group
        self.weight = torch.nn.Parameter(
            torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """`x` (float32) and `gate` of shape [..., head size]; the result has the gate's dtype."""
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.group)
        normed = F.rms_norm(x, weight.shape, None, self.eps).to(gate.dtype) * weight
        return (normed * F.silu(gate.float())).to(gate.dtype)


class GatedDeltaNet(MegatronModule):
    """A gated delta net in Megatron's place for attention.

    `in_proj` makes for every group its query, key, values, gates, and a scalar beta and a scalar
    decay for each value head. Under context parallelism ranks exchange tokens for heads, and each
    walks over whole sequences.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number = layer_number
        self.tp_group, self.cp_group = groups.tp, groups.cp
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_size, self.value_size = config.linear_key_head_dim, config.linear_value_head_dim
        self.heads = values // keys
        """Value heads of a group."""
        self.groups = keys // (self.tp_group.size() * self.cp_group.size())
        """Groups whose states this rank computes."""
        options = {
            "config": config,
            "bias": False,
            "is_expert": False,
            "tp_group": self.tp_group,
        }
        self.in_proj = submodules.in_proj(
            config.hidden_size,
            keys * sum(self._parts),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **options,
        )
        channels = keys // self.tp_group.size() * sum(self._parts[:3])
        heads = values // self.tp_group.size()
        where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        with tensor_parallel.get_cuda_rng_tracker().fork():
            self.conv1d = torch.nn.Conv1d(
                channels,
                channels,
                config.linear_conv_kernel_dim,
                groups=channels,
                bias=False,
                **where,
            )
        self.dt_bias = torch.nn.Parameter(torch.ones(heads, **where))
        self.A_log = torch.nn.Parameter(torch.zeros(heads, **where))
        for each in self._cut_parameters().values():
            each.tensor_model_parallel = True
            each.partition_dim, each.partition_stride = 0, 1
        self.out_norm = GatedNorm(config, self.value_size, self.tp_group)
        self.out_proj = submodules.out_proj(
            values * self.value_size,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **options,
        )
        self.computes_again = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    @property
    def _parts(self) -> list[int]:
        """What `in_proj` makes for a group: query, key, values, gates, betas and decays."""
        values = self.heads * self.value_size
        return [self.key_size, self.key_size, values, values, self.heads, self.heads]

    def _cut_parameters(self) -> dict[str, Any]:
        """What tensor-parallel ranks hold a part of, beside the projections."""
        return {"conv1d.weight": self.conv1d.weight, "dt_bias": self.dt_bias, "A_log": self.A_log}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`hidden_states` [s, b, h], of this rank's tokens, give as many, and no bias.

        Rows of a batch and the segments of `packed_seq_params` are sequences of their own. Nothing
        looks ahead, so padding behind a sequence needs no `attention_mask`.
        """
        if attention_mask is not None:
            raise ValueError("a gated delta net reads its tokens in order and takes no mask")
        made, _ = self.in_proj(hidden_states)
        length, rows = len(made) * self.cp_group.size(), made.shape[1]
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            borders = packed_seq_params.cu_seqlens_q
            lengths = borders.diff().tolist()
        else:
            borders = torch.tensor([0, length], dtype=torch.int32, device=made.device)
            lengths = [length] * rows
        if self.cp_group.size() > 1:
            made = self._tokens_for_heads(made, borders)
        chunks = Chunks(lengths, made.device)
        tokens = made.transpose(0, 1).flatten(0, 1)
        compute = partial(self._compute, lengths=lengths, chunks=chunks)
        if self.computes_again and self.training:
            out = tensor_parallel.checkpoint(compute, False, tokens)
        else:
            out = compute(tokens)
        out = out.unflatten(0, (rows, length)).transpose(0, 1)
        if self.cp_group.size() > 1:
            out = self._heads_for_tokens(out, borders)
        return self.out_proj(out.contiguous())

    def _compute(self, tokens: Tensor, *, lengths: list[int], chunks: Chunks) -> Tensor:
        """From what `in_proj` makes of sequences, [tokens, width], to [tokens, values]."""
        kernel, dt_bias, A_log = (self._here(each) for each in self._cut_parameters().values())
        made = tokens.unflatten(-1, (self.groups, -1))
        mixed, gate, beta, step = made.split([sum(self._parts[:3]), *self._parts[3:]], dim=-1)
        mixed = F.silu(convolve(mixed.flatten(1), kernel, lengths)).unflatten(-1, mixed.shape[1:])
        query, key, value = mixed.float().split(self._parts[:3], dim=-1)
        decay = -A_log.float().exp() * F.softplus(step.flatten(1).float() + dt_bias.float())
        out = gated_delta_rule(
            unit(query) * self.key_size**-0.5,
            unit(key),
            value.unflatten(-1, (self.heads, -1)),
            decay.unflatten(-1, (self.groups, -1)),
            beta.sigmoid().float(),
            chunks,
        )
        return self.out_norm(out, gate.unflatten(-1, (self.heads, -1))).flatten(1)

    def _here(self, parameter: Tensor) -> Tensor:
        """The part of this rank's heads whose states it computes."""
        return parameter.chunk(self.cp_group.size())[self.cp_group.rank()]

    def _order(self, borders: Tensor, length: int) -> Tensor:
        """Places in whole sequences of the ranks' tokens, one rank's after the other's."""
        size = self.cp_group.size()
        return torch.cat([held(borders, length, rank, size) for rank in range(size)])

    def _tokens_for_heads(self, x: Tensor, borders: Tensor) -> Tensor:
        """[s / CP, b, width] of all heads to [s, b, width / CP] in the sequences' order."""
        size = self.cp_group.size()
        sent = x.unflatten(-1, (size, -1)).movedim(2, 0)
        joined = all_to_all(self.cp_group, sent).flatten(0, 1)
        return joined[torch.argsort(self._order(borders, len(joined)))]

    def _heads_for_tokens(self, x: Tensor, borders: Tensor) -> Tensor:
        """[s, b, width / CP] in the sequences' order to [s / CP, b, width] of all heads."""
        sent = x[self._order(borders, len(x))].unflatten(0, (self.cp_group.size(), -1))
        return all_to_all(self.cp_group, sent).movedim(0, 2).flatten(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """What ranks hold parts of as one entry each, beside the projections' and the norm's."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own = self._cut_parameters()
        entries = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(own, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in ("in_proj", "out_norm", "out_proj"):
            entries |= sharded_state_dict_default(
                getattr(self, name),
                f"{prefix}{name}.",
                sharded_offsets,
                metadata,
                tp_group=self.tp_group,
            )
        return entries


def convolve(tokens: Tensor, kernel: Tensor, lengths: list[int]) -> Tensor:
    """Convolve each channel of `tokens` [tokens, channels] with its past, by `kernel` [channels, 1,
    width]. Sequences of `lengths` tokens know nothing of each other."""
    before = kernel.shape[-1] - 1
    each = torch.tensor(lengths)
    place = torch.arange(len(tokens)) + before * torch.repeat_interleave(each)
    place = place.to(tokens.device)
    # `before` zeros ahead of every sequence; the output at `place` ends at its token.
    wide = tokens.new_zeros(len(tokens) + before * len(lengths), tokens.shape[1])
    wide = wide.index_copy(0, place + before, tokens)
    return F.conv1d(wide.t()[None], kernel, groups=len(kernel))[0].t()[place]


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis, but for NORM_EPSILON."""
    return x * (x.square().sum(dim=-1, keepdim=True) + NORM_EPSILON).rsqrt()
