"""Adapters added to the weights that they stand beside, on a live model."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.export.blocks import Block, StoredPart
from swiftmeg.export.hf_files import HFWeights
from swiftmeg.export.lazy_weights import Supply, storage_of
from swiftmeg.export.shards import LiveWeight
from swiftmeg.models.family import Row
from swiftmeg.models.hf import HFModel
from swiftmeg.tuners.adapters import Attached, attached, numbered, store_everything
from swiftmeg.tuners.layers import EmbeddingAdapter
from swiftmeg.tuners.peft_format import refuse_tied, to_adapters

_PROBES = 4
"""Random inputs for which a merged weight is compared with the adapter."""

_AT_A_TIME = 2**20
"""Numbers of a weight that are merged in fp32 at a time."""


@torch.no_grad()
def merge(models: list[Any]) -> str:
    """Add scale * B @ A to every weight beside an adapter, then take the adapters away.

    Sums are made in fp32 and rounded once; every rank merges its own shards. Returns a line that
    says how many weights were merged and how many of them changed. Collective. UserError, on every
    rank, where a merged weight does not compute what base and adapter did.
    """
    results = {
        name: _add(each, weight, a, b)
        for each in attached(models)
        for name, weight, a, b in _beside(each)
    }
    _take_away(models)
    return _judge(results)


class Merging:
    """The weights of another supply with adapters added, each when it is asked for.

    Merges, checks and refuses as `merge` does. Adapters are cut, so no rank knows others' shards.
    """

    def __init__(self, models: list[Any], base: Supply) -> None:
        """`models` hold trained adapters, which are taken away; `base` was made before them."""
        self._base = base
        self._beside = {
            storage_of(weight): (name, each, a, b)
            for each in attached(models)
            for name, weight, a, b in _beside(each)
        }
        self._results: dict[str, tuple[bool, bool]] = {}
        _take_away(models)
        self._trained = {
            storage_of(parameter): parameter.detach().clone()
            for chunk in models
            for parameter in chunk.parameters()
            if parameter.requires_grad
        }

    def fill(self, live: LiveWeight) -> None:
        """Write one of this rank's weights, merged, or trained whole."""
        self._base.fill(live)
        key = storage_of(live.tensor)
        if key in self._trained:
            live.tensor.copy_(self._trained[key])
        elif key in self._beside:
            name, each, a, b = self._beside[key]
            self._results[name] = _add(each, live.tensor, a, b)

    @property
    def bytes_read(self) -> int:
        """Bytes of the base that this rank has read."""
        return self._base.bytes_read

    def finish(self) -> None:
        """UserError if the base has more, or a merged weight is wrong; collective."""
        self._base.finish()
        report = _judge(self._results)
        if torch.distributed.get_rank() == 0:
            print(report, flush=True)


def _take_away(models: list[Any]) -> None:
    for chunk in models:
        names = {id(module): name for name, module in chunk.named_modules()}
        for each in list(attached([chunk])):
            parent, _, last = names[id(each.adapter)].rpartition(".")
            setattr(chunk.get_submodule(parent), last, each.adapter.base_layer)
        store_everything(chunk)


def _add(each: Attached, weight: Tensor, a: Tensor, b: Tensor) -> tuple[bool, bool]:
    """Add an adapter to a weight, some rows at a time; whether it changes it, and rightly.

    The result is right if it maps random inputs to what the weight did before plus the adapter's
    part, computed as in training. Rounding the weights moves an output by about eps * sqrt(sum of
    squares of input times weight); eight times that is allowed.
    """
    adapter = each.adapter
    if isinstance(adapter, EmbeddingAdapter):
        weight = weight.t()  # a table maps one-hot vectors
    x = torch.randn(_PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x, a = x.to(weight.device), a.float()
    inner = F.linear(x, a) * adapter.scale
    eps = torch.finfo(adapter.A.weight.dtype).eps
    changes, right = False, True
    for rows, factor in zip(*(each.split(_rows(weight)) for each in (weight, b)), strict=True):
        before = rows.to(torch.float32, copy=True)
        change = adapter.scale * (factor.float() @ a)
        rows.copy_((before + change).to(rows.dtype))
        changes |= bool(change.any())
        after = rows.float()
        expected = F.linear(inner, factor.float())
        rounding = F.linear(x.square(), after.square() + before.square()).sqrt()
        error = F.linear(x, after - before) - expected
        right &= bool((error.abs() <= 8 * eps * rounding + 1e-6 * expected.abs()).all())
    return changes, right


def _rows(weight: Tensor) -> int:
    """How many rows are merged at a time."""
    return max(1, _AT_A_TIME // weight.shape[1])


def _judge(results: dict[str, tuple[bool, bool]]) -> str:
    """What was merged on all ranks, by weights' names; UserError if something is wrong."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, results)
    pairs = [pair for each in found for pair in each.items()]
    if bad := sorted({name for name, (_, right) in pairs if not right}):
        raise UserError(f"merged weights differ from base + scale * B @ A: {', '.join(bad[:5])}")
    everywhere = {name for name, _ in pairs}
    moved = {name for name, (changes, _) in pairs if changes}
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
        of_rows, columns = block
        a, b = a[:, columns].float(), b[of_rows]
        merged = torch.empty_like(tensor)
        parts = zip(*(each.split(_rows(tensor)) for each in (merged, tensor, b)), strict=True)
        for target, rows, factor in parts:
            target.copy_(rows.float() + self.scale * (factor.float() @ a))
        return merged

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
