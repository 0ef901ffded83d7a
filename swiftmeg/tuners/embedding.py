"""LoRA beside the word embedding, whose input is a token and not a vector."""

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from swiftmeg.tuners.factors import Factor
from swiftmeg.tuners.layers import Adapter


class EmbeddingAdapter(Adapter):
    """Beside the word embedding: A [rank, vocabulary] is cut like the table, B is whole.

    As in PEFT there is no dropout, since the input is not a vector.
    """

    def factors(self, rank: int) -> tuple[Factor, Factor]:
        weight = self.base_layer.weight
        b = Factor((weight.shape[1], rank), weight, None)
        if self.base_layer.reduce_scatter_embeddings:
            b.sum_over_positions()
        return Factor((rank, weight.shape[0]), weight, 1), b

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """Vectors [b, s, h] of `ids` [b, s], or [s / ranks, b, h] under sequence parallelism."""
        result = self.base_layer(ids)
        if self.disable_adapters:
            return result
        result = result + self.change(ids)
        if self.magnitude is None:
            return result
        return result * (self.magnitude.weight / self.norms()).to(result.dtype)

    def matrix(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight.t()  # a table maps one-hot vectors

    def change(self, ids: Tensor, *args: Any) -> Tensor:
        first = self.base_layer.vocab_start_index
        elsewhere = (ids < first) | (ids >= self.base_layer.vocab_end_index)
        rows = (ids - first).masked_fill(elsewhere, 0)
        hidden = F.embedding(rows, self.A.weight.t()) * self.scale
        hidden = hidden.masked_fill(elsewhere[..., None], 0.0)
        if self.base_layer.reduce_scatter_embeddings:
            hidden = hidden.transpose(0, 1).contiguous()
            hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
        else:
            hidden = reduce_from_tensor_model_parallel_region(hidden, group=self.group)
        return self.B(hidden)
