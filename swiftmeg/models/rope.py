"""Rotary position embeddings with the frequencies that transformers computes.

Megatron's own scaling covers one fixed form of Llama 3's; taking the frequencies from transformers
makes every scaling of a published config.json mean the same in training and in inference.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from swiftmeg.errors import UserError
from swiftmeg.models import arguments
from swiftmeg.models.context import positions
from swiftmeg.models.kernels import rope
from swiftmeg.models.kernels.qkv import Rotation


def rope_types(hf_config: Any) -> dict[str | None, str]:
    """The scaling that a transformers config asks for, by type of layer.

    Under None where all layers share it. UserError if one is not supported.
    """
    config = hf_config.to_dict()
    return {kind: arguments.rope_type(config, kind) for kind in arguments.ropes(config)}


def rotate_pack(
    heads: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> Tensor:
    """Apply rotary embeddings to the `heads` [t, n, d] of all samples of a pack at once.

    Takes the arguments of Megatron's `_apply_rotary_pos_emb_thd`, and does the same without waiting
    for the GPU: `freqs` [longest, 1, 1, dim] are angles by position in a sample. With
    `mla_rotary_interleaved` pairs lie beside each other before, and apart after.
    """
    at = pack_rotation(freqs, cu_seqlens, len(heads), mscale, rotary_interleaved, cp_group)
    return rope.rotate(
        heads,
        at.positions,
        at.cosine,
        at.sine,
        reads_pairs=rotary_interleaved or mla_rotary_interleaved,
        writes_pairs=rotary_interleaved,
    )


def pack_rotation(
    freqs: Tensor, cu_seqlens: Tensor, local: int, mscale: float, interleaved: bool, cp_group: Any
) -> Rotation:
    """Return the rotary embeddings of the `local` tokens that this rank holds of a pack.

    The arguments are those of `rotate_pack`.
    """
    cosine, sine = _tables(freqs, mscale, interleaved)
    return Rotation(_positions_of(cu_seqlens, local, cp_group), cosine, sine, interleaved)


def _positions_of(cu_seqlens: Tensor, local: int, cp_group: Any) -> Tensor:
    """Positions int64 [local] of this rank's tokens, found once a batch: all layers share them."""
    found: Tensor | None = getattr(cu_seqlens, "positions", None)
    if found is None or len(found) != local:
        found = positions(cu_seqlens, local, cp_group.rank(), cp_group.size())
        cu_seqlens.positions = found  # type: ignore[attr-defined]
    return found


def _tables(freqs: Tensor, mscale: float, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Cosine and sine [longest, dim / 2] of angles in which each stands twice, found once."""
    tables: dict[float, tuple[Tensor, Tensor]] = freqs.__dict__.setdefault("tables", {})
    if mscale not in tables:
        angles = freqs[:, 0, 0].float()
        angles = angles[:, ::2] if interleaved else angles[:, : angles.shape[1] // 2]
        tables[mscale] = (angles.cos() * mscale, angles.sin() * mscale)
    return tables[mscale]


class ScaledRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding over a transformers config's frequencies.

    It turns the first `dim` entries of a head: pairs (i, i + dim / 2), or (2i, 2i + 1) if
    `interleaved`. `attention_scaling` multiplies cosine and sine; 1 unless the scaling is yarn.
    `layer_type` chooses between the frequencies of layers of several types.
    """

    def __init__(
        self,
        hf_config: Any,
        dim: int,
        cp_group: Any,
        interleaved: bool = False,
        layer_type: str | None = None,
    ) -> None:
        super().__init__(dim, rotary_percent=1.0, rotary_interleaved=interleaved, cp_group=cp_group)
        self.hf_config = hf_config
        self.layer_type = layer_type
        self.kind = rope_types(hf_config)[layer_type]
        self.attention_scaling = 1.0
        if self.kind == "default":
            parameters = arguments.ropes(hf_config.to_dict())[layer_type]
            theta = float(parameters.get("rope_theta", 10000.0))
            exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
            self.inv_freq = 1.0 / theta**exponents
        else:
            self.inv_freq, self.attention_scaling = self._scaled(None)
        if self.inv_freq.numel() != dim // 2:
            raise UserError(
                f"config.json: its rope_parameters turn {2 * self.inv_freq.numel()} entries of a "
                f"head, the model's arguments {dim}: they contradict each other"
            )

    def _scaled(self, seq_len: int | None) -> tuple[Tensor, float]:
        typed = {} if self.layer_type is None else {"layer_type": self.layer_type}
        frequencies, scaling = ROPE_INIT_FUNCTIONS[self.kind](
            self.hf_config, torch.device("cpu"), seq_len=seq_len, **typed
        )
        return frequencies, float(scaling)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [max_seq_len, dim / 2]; the dynamic scaling depends on `max_seq_len`."""
        if self.kind == "dynamic":
            frequencies, _ = self._scaled(int(max_seq_len))
            self.inv_freq = frequencies.to(self.inv_freq.device)
        return super().get_freqs_non_repeated(max_seq_len, offset)


class TypedRotaryEmbedding(RotaryEmbedding):
    """Rotary embeddings of layers of several types, whose frequencies differ.

    Megatron hands every layer what the model's one embedding returns: here the angles of all types
    side by side, of which `choose` lets a layer take its own.
    """

    def __init__(self, embeddings: dict[str, ScaledRotaryEmbedding]) -> None:
        first = next(iter(embeddings.values()))
        super().__init__(first.inv_freq.numel() * 2, rotary_percent=1.0, cp_group=first.cp_group)
        self.embeddings = torch.nn.ModuleDict(embeddings)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Angles [s, 1, 1, types * dim]."""
        return torch.cat([each(*args, **kwargs) for each in self.embeddings.values()], dim=-1)

    def choose(self, attention: torch.nn.Module, layer_type: str) -> None:
        """Hand `attention` the angles of its type."""
        count, place = len(self.embeddings), list(self.embeddings).index(layer_type)

        def take(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            angles = kwargs["rotary_pos_emb"].chunk(count, dim=-1)[place].contiguous()
            return args, kwargs | {"rotary_pos_emb": angles}

        attention.register_forward_pre_hook(take, with_kwargs=True)


class LatentRotaryEmbedding(ScaledRotaryEmbedding):
    """The same for multi-latent attention, which asks as Megatron's yarn embedding answers."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """Angles [s, 1, 1, dim], and the factor on cosine and sine."""
        return super().forward(*args, **kwargs), self.attention_scaling
