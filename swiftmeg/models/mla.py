"""Multi-latent attention (arXiv:2405.04434) over either layer backend."""

from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
    MultiLatentAttention,
)
from torch import Tensor

NORM_EPSILON = 1e-6
"""Of the norms of compressed queries and keys, in DeepSeek's code and in transformers': whatever
config.json says for the others."""


def latent_attention_submodules(
    provider: BackendSpecProvider, core_attention: type, linear_proj: Any
) -> MLASelfAttentionSubmodules:
    """The submodules of latent attention in both backends.

    Norms stand alone, and every rank holds the down projections whole.
    """
    column = provider.column_parallel_linear()
    down = provider.linear()
    norm = provider.layer_norm(rms_norm=True, for_qk=True)
    return MLASelfAttentionSubmodules(
        linear_q_proj=column,
        linear_q_down_proj=down,
        linear_q_up_proj=column,
        linear_kv_down_proj=down,
        linear_kv_up_proj=column,
        core_attention=core_attention,
        linear_proj=linear_proj,
        q_layernorm=norm,
        kv_layernorm=norm,
    )


class LatentAttention(MLASelfAttention):
    """Megatron's attention over compressed keys and values, right in every layout and backend.

    Its own constructor takes no whole down projection but TransformerEngine's, and norms what
    enters `linear_q_proj` where queries are not compressed, which no published model does. Its
    forward pass, without sequence parallelism, leaves the gradient of the keys' positional part on
    the rank whose heads it came through.
    """

    def __init__(
        self,
        config: Any,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        MultiLatentAttention.__init__(
            self,
            config,
            submodules,
            layer_number,
            *args,
            attention_type="self",
            pg_collection=pg_collection,
            name=name,
            **kwargs,
        )
        query_size = config.num_attention_heads * self.q_head_dim
        if config.q_lora_rank is None:
            self.linear_q_proj = self._up(submodules.linear_q_proj, config.hidden_size, query_size)
        else:
            self.linear_q_down_proj = self._down(submodules.linear_q_down_proj, config.q_lora_rank)
            self.q_layernorm = self._norm(submodules.q_layernorm, config.q_lora_rank)
            self.linear_q_up_proj = self._up(
                submodules.linear_q_up_proj, config.q_lora_rank, query_size
            )
        self.linear_kv_down_proj = self._down(
            submodules.linear_kv_down_proj, config.kv_lora_rank + config.qk_pos_emb_head_dim
        )
        self.kv_layernorm = self._norm(submodules.kv_layernorm, config.kv_lora_rank)
        self.linear_kv_up_proj = self._up(
            submodules.linear_kv_up_proj,
            config.kv_lora_rank,
            config.num_attention_heads * (config.qk_head_dim + config.v_head_dim),
        )

    def _linear(self, kind: Any, inputs: int, outputs: int, **options: Any) -> torch.nn.Module:
        # No buffer of TransformerEngine's overlapped communication has the name "latent", which
        # tells it to leave these layers out.
        return kind(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="latent",
            **options,
        )

    def _down(self, kind: Any, rank: int) -> torch.nn.Module:
        options = {"parallel_mode": "duplicated", "skip_weight_param_allocation": False}
        return self._linear(kind, self.config.hidden_size, rank, **options)

    def _up(self, kind: Any, inputs: int, outputs: int) -> torch.nn.Module:
        return self._linear(kind, inputs, outputs, gather_output=False, tp_group=self.tp_group)

    def _norm(self, kind: Any, size: int) -> torch.nn.Module:
        norm: torch.nn.Module = kind(config=self.config, hidden_size=size, eps=NORM_EPSILON)
        if not self.config.sequence_parallel:
            # Every rank norms whole queries and keys, and has the whole gradient; Megatron sums
            # those of what is called q_layernorm over ranks unless it is to take their mean.
            norm.weight.average_gradients_across_tp_domain = True  # type: ignore[union-attr]
        return norm

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compressed queries, and compressed keys and values with the keys' positional part."""
        query, key_value = super()._qkv_down_projection(hidden_states)
        if self.tp_group.size() > 1 and not self.config.sequence_parallel:
            latent, position = key_value.split(
                [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1
            )
            position = copy_to_tensor_model_parallel_region(position, group=self.tp_group)
            key_value = torch.cat([latent, position], dim=-1)
        return query, key_value
