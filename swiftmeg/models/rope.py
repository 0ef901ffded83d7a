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


def rope_type(hf_config: Any) -> str:
    """The scaling that a transformers config asks for; UserError if it is not supported."""
    return arguments.rope_type(hf_config.to_dict())


class ScaledRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding over a transformers config's frequencies.

    It turns the first `dim` entries of a head: pairs (i, i + dim / 2), or (2i, 2i + 1) if
    `interleaved`. `attention_scaling` multiplies cosine and sine; 1 unless the scaling is yarn.
    """

    def __init__(self, hf_config: Any, dim: int, cp_group: Any, interleaved: bool = False) -> None:
        super().__init__(dim, rotary_percent=1.0, rotary_interleaved=interleaved, cp_group=cp_group)
        self.hf_config = hf_config
        self.kind = rope_type(hf_config)
        self.attention_scaling = 1.0
        if self.kind == "default":
            theta = float((hf_config.rope_parameters or {}).get("rope_theta", 10000.0))
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
        frequencies, scaling = ROPE_INIT_FUNCTIONS[self.kind](
            self.hf_config, torch.device("cpu"), seq_len=seq_len
        )
        return frequencies, float(scaling)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [max_seq_len, dim / 2]; the dynamic scaling depends on `max_seq_len`."""
        if self.kind == "dynamic":
            frequencies, _ = self._scaled(int(max_seq_len))
            self.inv_freq = frequencies.to(self.inv_freq.device)
        return super().get_freqs_non_repeated(max_seq_len, offset)


class LatentRotaryEmbedding(ScaledRotaryEmbedding):
    """The same for multi-latent attention, which asks as Megatron's yarn embedding answers."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """Angles [s, 1, 1, dim], and the factor on cosine and sine."""
        return super().forward(*args, **kwargs), self.attention_scaling
