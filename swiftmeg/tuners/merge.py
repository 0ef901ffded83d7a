"""Adapters added to the weights that they stand beside, on a live model."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.export.hf_files import listed
from swiftmeg.export.lazy_weights import Supply, storage_of
from swiftmeg.export.shards import LiveWeight, live_weights
from swiftmeg.tuners.adapters import Attached, attached, numbered, store_everything
from swiftmeg.tuners.dora import row_factors
from swiftmeg.tuners.embedding import EmbeddingAdapter
from swiftmeg.tuners.merged_weights import rows_at_a_time

_PROBES = 4
"""Random inputs for which a merged weight is compared with the adapter."""


@torch.no_grad()
def merge(models: list[Any]) -> str:
    """Add scale * B @ A to every weight beside an adapter, then take the adapters away.

    Sums are made in fp32 and rounded once; every rank merges its own shards. Returns a line that
    says how many weights were merged and how many of them changed. Collective. UserError, on every
    rank, where a merged weight does not compute what base and adapter did.
    """
    results = {}
    for each in attached(models):
        lengthened = lengthening(each)  # of the weight as it is
        for name, weight, a, b in _beside(each):
            results[name] = _add(each, weight, a, b, lengthened)
    _take_away(models)
    return _judge(results, set(results))


class Merging:
    """The weights of another supply with adapters added, each when it is asked for.

    Merges, checks and refuses as `merge` does. Adapters are cut, so no rank knows others' shards.
    """

    def __init__(self, models: list[Any], base: Supply) -> None:
        """`models` hold trained adapters, which are taken away; `base` was made before them."""
        self._base = base
        live = {storage_of(each.tensor): each for each in live_weights(models)}
        self._beside = {}
        for each in attached(models):
            lengthened = None
            if each.adapter.magnitude is not None:  # which needs all ranks' parts of the weight
                weight = each.adapter.base_layer.weight
                base.fill(live[storage_of(weight)])
                lengthened = lengthening(each)
                weight.untyped_storage().resize_(0)
            for name, weight, a, b in _beside(each):
                self._beside[storage_of(weight)] = name, each, a, b, lengthened
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
            name, each, a, b, lengthened = self._beside[key]
            self._results[name] = _add(each, live.tensor, a, b, lengthened)

    @property
    def bytes_read(self) -> int:
        """Bytes of the base that this rank has read."""
        return self._base.bytes_read

    def finish(self) -> None:
        """UserError if the base has more, or a merged weight is wrong; collective."""
        self._base.finish()
        report = _judge(self._results, {name for name, *_ in self._beside.values()})
        if torch.distributed.get_rank() == 0:
            print(report, flush=True)


def _take_away(models: list[Any]) -> None:
    for chunk in models:
        names = {id(module): name for name, module in chunk.named_modules()}
        for each in list(attached([chunk])):
            parent, _, last = names[id(each.adapter)].rpartition(".")
            setattr(chunk.get_submodule(parent), last, each.adapter.base_layer)
        store_everything(chunk)


def lengthening(each: Attached) -> Tensor | None:
    """What DoRA multiplies the rows of weight and adapter by [out]; None without it. Collective."""
    magnitude = each.adapter.magnitude
    return (
        None if magnitude is None else row_factors(magnitude.weight.float(), each.adapter.norms())
    )


def _add(
    each: Attached, weight: Tensor, a: Tensor, b: Tensor, lengthened: Tensor | None
) -> tuple[bool, bool]:
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
    lengths = b.new_ones(len(b), dtype=torch.float32) if lengthened is None else lengthened
    for rows, factor, length in zip(
        *(part.split(rows_at_a_time(weight)) for part in (weight, b, lengths)), strict=True
    ):
        before = rows.to(torch.float32, copy=True)
        after = (before + adapter.scale * (factor.float() @ a)) * length[:, None]
        changes |= not torch.equal(after, before)
        rows.copy_(after.to(rows.dtype))
        after = rows.float()
        before *= length[:, None]
        expected = F.linear(inner, factor.float()) * length
        rounding = F.linear(x.square(), after.square() + before.square()).sqrt()
        error = F.linear(x, after - before) - expected
        right &= bool((error.abs() <= 8 * eps * rounding + 1e-6 * expected.abs()).all())
    return changes, right


def _judge(results: dict[str, tuple[bool, bool]], adapted: set[str]) -> str:
    """What was merged on all ranks, by weights' names; UserError if something is wrong.

    `adapted` are the weights here that have an adapter.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (results, adapted))
    pairs = [pair for each, _ in found for pair in each.items()]
    wanted = set().union(*(names for _, names in found))
    if left := wanted.difference(name for name, _ in pairs):
        raise UserError(
            f"{len(wanted)} weights have an adapter, but {listed(left)} of them were not merged"
        )
    if bad := sorted({name for name, (_, right) in pairs if not right}):
        raise UserError(f"merged weights differ from base + scale * B @ A: {', '.join(bad[:5])}")
    everywhere = {name for name, _ in pairs}
    moved = {name for name, (changes, _) in pairs if changes}
    return (
        f"merged {len(everywhere)} weights with their adapters, {len(moved)} of which change; "
        "every one computes what base + scale * B @ A does"
    )


def _beside(each: Attached) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Every weight here beside an adapter: its name in the model, and the factors A and B."""
    adapter = each.adapter
    pairs = zip(numbered(adapter.A, adapter), numbered(adapter.B, adapter), strict=True)
    for weight, ((number, a), (_, b)) in zip(adapter.base_weights(), pairs, strict=True):
        yield f"{each.name}.weight{'' if number is None else number}", weight, a, b
