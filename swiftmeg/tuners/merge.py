"""Adapters added to the weights that they stand beside, on a live model."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.export.parts import Block, StoredPart
from swiftmeg.export.weights import HFWeights
from swiftmeg.models.family import Row
from swiftmeg.models.hf import HFModel
from swiftmeg.tuners.adapters import Attached, attached, numbered, store_everything
from swiftmeg.tuners.layers import EmbeddingAdapter
from swiftmeg.tuners.peft_format import refuse_tied, to_adapters

_PROBES = 4
"""Random inputs for which a merged weight is compared with the adapter."""


@torch.no_grad()
def merge(models: list[Any]) -> str:
    """Add scale * B @ A to every weight beside an adapter, then take the adapters away.

    Sums are made in fp32 and rounded once; every rank merges its own shards. Returns a line that
    says how many weights were merged and how many of them changed. Collective. UserError, on every
    rank, where a merged weight does not compute what base and adapter did.
    """
    changed: dict[str, bool] = {}
    wrong: list[str] = []
    for chunk in models:
        names = {id(module): name for name, module in chunk.named_modules()}
        for each in list(attached([chunk])):
            for name, weight, a, b in _beside(each):
                before = weight.to(torch.float32, copy=True)
                change = each.adapter.scale * (b.float() @ a.float())
                change = change.t() if isinstance(each.adapter, EmbeddingAdapter) else change
                weight.copy_((before + change).to(weight.dtype))
                changed[name] = bool(change.any())
                if not _is_right(each, before, weight, a, b):
                    wrong.append(name)
            parent, _, last = names[id(each.adapter)].rpartition(".")
            setattr(chunk.get_submodule(parent), last, each.adapter.base_layer)
        store_everything(chunk)
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (changed, wrong))
    if bad := sorted({name for _, names in found for name in names}):
        raise UserError(f"merged weights differ from base + scale * B @ A: {', '.join(bad[:5])}")
    everywhere = {name for each, _ in found for name in each}
    moved = {name for each, _ in found for name, moves in each.items() if moves}
    return (
        f"merged {len(everywhere)} weights with their adapters, {len(moved)} of which change; "
        "every one computes what base + scale * B @ A does"
    )


class MergedWeights(HFWeights):
    """An HF folder's weights with a PEFT adapter added, in fp32 and rounded once.

    UserError if the adapter is not of this model.
    """

    def __init__(self, model: HFModel, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__(model.folder, model.config)
        self.adapters = to_adapters(config, tensors, model)
        if model.config.get("tie_word_embeddings"):
            refuse_tied(self.adapters)
        rank = config["r"]
        self.scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        self.changed = {name for name, (_, b) in self.adapters.factors.items() if b.any()}

    def parts(self, row: Row) -> list[StoredPart]:
        """The HF tensors of a row, with what the adapter makes of them."""
        whole = zip(row.hf, super().parts(row), strict=True)
        return [part.then(partial(self._merged, name)) for name, part in whole]

    def _merged(self, name: str, tensor: Tensor, block: Block) -> Tensor:
        if name in self.adapters.trained:
            return self.adapters.trained[name][block].to(tensor.dtype)
        if name not in self.adapters.factors:
            return tensor
        a, b = self.adapters.factors[name]
        if name.endswith("embed_tokens.weight"):
            a, b = b.t(), a.t()  # a table maps one-hot vectors
        rows, columns = block
        change = self.scale * (b[rows].float() @ a[:, columns].float())
        return (tensor.float() + change).to(tensor.dtype)

    def report(self) -> str:
        """What was merged."""
        return (
            f"merged {len(self.adapters.factors)} weights with their adapters, "
            f"{len(self.changed)} of which change; {len(self.adapters.trained)} were replaced"
        )


def _beside(each: Attached) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Every weight here beside an adapter: its name in the model, and the factors A and B."""
    adapter = each.adapter
    pairs = zip(numbered(adapter.A, adapter), numbered(adapter.B, adapter), strict=True)
    for weight, ((number, a), (_, b)) in zip(adapter.base_weights(), pairs, strict=True):
        yield f"{each.name}.weight{'' if number is None else number}", weight, a, b


def _is_right(each: Attached, before: Tensor, after: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether a merged shard maps random inputs to what it did before plus the adapter's part.

    The adapter's part is computed as in training. Rounding the weights moves an output by about
    eps * sqrt(sum of squares of input times weight); eight times that is allowed.
    """
    generator = torch.Generator().manual_seed(0)
    after = after.float()
    if isinstance(each.adapter, EmbeddingAdapter):
        before, after = before.t(), after.t()  # a table maps one-hot vectors
    x = torch.randn(_PROBES, before.shape[1], generator=generator).to(before.device)
    expected = F.linear(F.linear(x, a.float()) * each.adapter.scale, b.float())
    rounding = F.linear(x.square(), after.square() + before.square()).sqrt()
    size = torch.finfo(each.adapter.A.weight.dtype).eps * rounding
    error = F.linear(x, after - before) - expected
    return bool((error.abs() <= 8 * size + 1e-6 * expected.abs()).all())
