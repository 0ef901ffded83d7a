"""Self-attention over packs, in few steps, for either layer backend."""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from swiftmeg.models.kernels import qkv
from swiftmeg.models.native.norm import RMSNorm
from swiftmeg.models.rope import pack_rotation


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention, which splits, norms and rotates the heads of a pack at once.

    What else Megatron's can do, it does as Megatron's.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [t, 1, h] of a pack, or [s, b, h], to the same, and a bias to be added."""
        if args or not self._at_once(rotary_pos_emb, packed_seq_params):
            return super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **others,
            )
        mixed, _ = self.linear_qkv(hidden_states)
        mixed = mixed[:, 0]
        groups = self.num_query_groups_per_partition
        heads = qkv.Heads(
            groups,
            self.num_attention_heads_per_partition // groups,
            self.hidden_size_per_attention_head,
        )
        rotation = pack_rotation(
            rotary_pos_emb,
            packed_seq_params.cu_seqlens_q,
            len(mixed),
            self._yarn_concentration_factor,
            self.config.rotary_interleaved,
            self.pg_collection.cp,
        )
        norm = None
        if isinstance(self.q_layernorm, RMSNorm):
            q, k = self.q_layernorm, self.k_layernorm
            norm = qkv.HeadNorm(q.weight, k.weight, q.eps, q.offset)
        query, key, value = qkv.split_and_rotate(mixed, heads, rotation, norm)
        out = self.core_attention(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            attention_bias=None,
            packed_seq_params=packed_seq_params,
        )
        return self.linear_proj(out.reshape(len(out), 1, -1))

    def _at_once(self, rotary_pos_emb: Any, packed_seq_params: Any) -> bool:
        config = self.config
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        plain = isinstance(rotary_pos_emb, Tensor) and not config.no_rope_freq
        whole = config.num_query_groups >= self.world_size and not config.attention_output_gate
        moved = self.checkpoint_core_attention or config.fine_grained_activation_offloading
        norms = (self.q_layernorm, self.k_layernorm)
        known = all(isinstance(each, IdentityOp | RMSNorm | None) for each in norms)
        return bool(packed and plain and whole and not moved and known and not config.fp8)
