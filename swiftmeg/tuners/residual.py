"""Bases of adapters that took their own start out of them: PiSSA's and OLoRA's.

PEFT stores the trained factors alone; when it reads them it decomposes the base weight once more
and subtracts the start from it. The same is done here, in fp32.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.export.blocks import Block, StoredPart
from swiftmeg.export.hf_files import HFWeights
from swiftmeg.models.family import Row
from swiftmeg.models.hf import HFModel
from swiftmeg.tuners.adapters import attached
from swiftmeg.tuners.embedding import EmbeddingAdapter


def first_factors(start: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] at the start, of which scale * B @ A left `weight` [out, in].

    `start` is PiSSA (arXiv:2404.02948: the largest singular values) or OLoRA (arXiv:2406.01775: the
    first columns of a QR decomposition).
    """
    weight = weight.float()
    if rank > min(weight.shape):
        raise UserError(
            f"init_lora_weights {start} of rank {rank} for a weight {tuple(weight.shape)}: it has "
            "no such start"
        )
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, singular, v = torch.linalg.svd(weight, full_matrices=False)
    root = (singular[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


class ResidualWeights(HFWeights):
    """An HF folder's weights as adapters that are attached to `models` began beside them."""

    def __init__(self, model: HFModel, models: list[Any], start: str) -> None:
        super().__init__(model.folder, model.config)
        plan = {row.mcore: row for row in model.family.plan(model.config)}
        self._start = start
        self._adapted = {
            name: (each.adapter.A.weight.shape[-2], each.adapter.scale)
            for each in attached(models)
            if not isinstance(each.adapter, EmbeddingAdapter)
            for name in plan[f"{each.name}.weight"].hf
        }
        """Weights with an adapter here, its rank and scale; PEFT has none beside experts."""
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def parts(self, row: Row) -> list[StoredPart]:
        """The HF tensors of a row, without what the adapters took out of them."""
        return [
            part.then(partial(self._residual, name, part)) if name in self._adapted else part
            for name, part in zip(row.hf, super().parts(row), strict=True)
        ]

    def _residual(self, name: str, whole: StoredPart, values: Tensor, block: Block) -> Tensor:
        rank, scale = self._adapted[name]
        if name not in self._found:
            self._found[name] = first_factors(self._start, whole.read(), rank, scale)
        a, b = self._found[name]
        return values.float() - scale * (b[block[0]] @ a[:, block[1]])
