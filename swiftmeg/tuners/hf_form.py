"""Adapters and what is trained beside them, as tensors of the Hugging Face model.

A fused Megatron layer is several Hugging Face layers: each takes the shared A, and those rows of B
that are its rows of the weight. The weight rows of the model's family say which they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.export.hf_files import listed
from swiftmeg.export.hf_reader import EMBEDDING, OUTPUT
from swiftmeg.export.shards import LiveWeight, live_weights
from swiftmeg.models.family import Family, HFConfig, Row
from swiftmeg.models.layout import Dims
from swiftmeg.tuners.adapters import Attached, attached, numbered
from swiftmeg.tuners.embedding import EmbeddingAdapter
from swiftmeg.tuners.factors import Factor
from swiftmeg.tuners.peft_format import Factors, HFAdapters


@torch.no_grad()
def to_hf_form(
    models: list[Any], family: Family, config: HFConfig, dims: Dims
) -> HFAdapters | None:
    """Gather all adapters of a live model on the first rank; others get None. Collective."""
    plan = {each.mcore: each for each in family.plan(config)}
    mine = HFAdapters()
    for each in attached(models):
        for row, a, b, magnitude in _matrices(each, plan):
            if _speaks(each.adapter.A.weight.dim() == 3):
                mine.factors |= _split(each, row, (a, b, magnitude), dims)
    for live in _trained(models):
        if live.name not in plan:
            continue
        row = plan[live.name]
        whole = row.layout.unshard(_gather(live.tensor, live.axis, live.group), live.axis)
        if _speaks(live.routed):
            mine.trained |= zip(row.hf, row.layout.split(whole, dims), strict=True)
    return _collect(mine)


def _collect(mine: HFAdapters) -> HFAdapters | None:
    """What all ranks hand on, on the first one, from one rank after the other; collective.

    A tensor that travels takes all of its memory along, and live ones are views of Megatron's
    buffers and of all experts' factors: so they are copied before.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gives: list[bool] = [False] * world
    torch.distributed.all_gather_object(gives, bool(mine.changed))
    for giver in [giver for giver in range(1, world) if gives[giver]]:
        if rank == giver:
            torch.distributed.send_object_list([mine.copied()], dst=0)
        elif rank == 0:
            received: list[HFAdapters] = [HFAdapters()]
            torch.distributed.recv_object_list(received, src=giver)
            mine.factors |= received[0].factors
            mine.trained |= received[0].trained
    return mine if rank == 0 else None


def _trained(models: list[Any]) -> Iterator[LiveWeight]:
    """Weights that are trained beside the adapters, and the buffers of modules trained whole."""
    weights = list(live_weights(models))
    whole = {each.name for each in weights if each.tensor.requires_grad}
    for each in weights:
        beside = each.name.rpartition(".")[0] + ".weight"
        is_buffer = not isinstance(each.tensor, torch.nn.Parameter)
        if each.name in whole or (is_buffer and beside in whole):
            yield each


def _speaks(routed: bool) -> bool:
    """Whether this rank hands on what it and others hold, an expert's or not."""
    if routed:
        return not mpu.get_expert_tensor_parallel_rank() and not mpu.get_expert_data_parallel_rank()
    first_copy = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    return first_copy and mpu.get_tensor_model_parallel_rank() == 0


def _matrices(
    each: Attached, plan: dict[str, Row]
) -> Iterator[tuple[Row, Tensor, Tensor, Tensor | None]]:
    """The weights beside an adapter on this rank, with their whole factors in Megatron's order."""
    adapter = each.adapter
    pairs = zip(numbered(adapter.A, adapter), numbered(adapter.B, adapter), strict=True)
    for (number, a), (_, b) in pairs:
        row = plan[f"{each.name}.weight{'' if number is None else number}"]
        a, b = _whole(each, row, adapter.A, a), _whole(each, row, adapter.B, b)
        magnitude = None
        if adapter.magnitude is not None:
            shards = _gather(
                adapter.magnitude.weight[:, None], adapter.magnitude.axis, adapter.group
            )
            magnitude = row.layout.unshard(shards, adapter.magnitude.axis)[:, 0]
        yield row, a, b, magnitude


def _whole(each: Attached, row: Row, factor: Factor, shard: Tensor) -> Tensor:
    """All of a factor: rows in the order of the weight's, columns one rank's after the other's."""
    if factor.axis is None:
        return shard.detach().cpu()
    axis = factor.axis - factor.weight.dim() + 2  # of the matrix
    shards = _gather(shard, axis, each.adapter.group)
    return row.layout.unshard(shards, 0) if axis == 0 else torch.cat(shards, dim=1)


def _split(
    each: Attached, row: Row, whole: tuple[Tensor, Tensor, Tensor | None], dims: Dims
) -> dict[str, Factors]:
    a, b, magnitude = whole
    said = each.adapter.alpha, each.adapter.scale
    if isinstance(each.adapter, EmbeddingAdapter):
        (table,) = row.layout.split(a.t(), dims)
        return {row.hf[0]: Factors(table.t().contiguous(), b, *said, magnitude)}
    lengths: list[Tensor | None] = [None] * len(row.hf)
    if magnitude is not None:
        columns = row.layout.split(magnitude[:, None], dims)
        lengths = [column[:, 0].contiguous() for column in columns]
    parts = zip(row.hf, row.layout.split(b, dims), lengths, strict=True)
    return {name: Factors(a, part.contiguous(), *said, length) for name, part, length in parts}


def _gather(shard: Tensor, axis: int | None, group: Any) -> list[Tensor]:
    """The shards of all ranks of `group`, on the CPU; a replicated tensor's own."""
    shard = shard.detach().contiguous()
    if axis is None or group.size() == 1:
        return [shard.cpu()]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    torch.distributed.all_gather(shards, shard, group=group)
    return [each.cpu() for each in shards]


@torch.no_grad()
def fill_adapters(
    models: list[Any], adapters: HFAdapters, family: Family, config: HFConfig, dims: Dims
) -> None:
    """Copy whole tensors into this rank's adapters and trained weights; collective.

    UserError, with the names, where layers that Megatron fuses have different A, which would need
    an adapter each, and for tensors that are missing or that nothing took.
    """
    plan = {each.mcore: each for each in family.plan(config)}
    used: set[str] = set()
    for each in attached(models):
        adapter = each.adapter
        pairs = zip(numbered(adapter.A, adapter), numbered(adapter.B, adapter), strict=True)
        for (number, a), (_, b) in pairs:
            row = plan[f"{each.name}.weight{'' if number is None else number}"]
            with _fitting(row):
                whole_a, whole_b = _join(each, row, adapters, dims)
                _copy(a, _cut(each, row, adapter.A, whole_a))
                _copy(b, _cut(each, row, adapter.B, whole_b))
                if adapter.magnitude is not None:
                    _copy(adapter.magnitude.weight, _lengths(each, row, adapters, dims))
            used.update(row.hf)
    for live in _trained(models):
        tied_head = live.name == OUTPUT and live.name not in plan
        name = EMBEDDING if tied_head else live.name
        if name not in plan:
            continue
        row = plan[name]
        if missing := [name for name in row.hf if name not in adapters.trained]:
            raise UserError(f"the adapter holds no {', '.join(missing)}")
        with _fitting(row):
            joined = row.layout.join([adapters.trained[name] for name in row.hf], dims)
            _copy(live.tensor, row.layout.shard(joined, live.axis, live.rank, live.group_size))
        used.update(row.hf)
    taken: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(taken, used)
    if left := {*adapters.factors, *adapters.trained}.difference(*taken):
        raise UserError(f"nothing in the model took the adapter's {listed(left)}")


@contextmanager
def _fitting(row: Row) -> Iterator[None]:
    """UserError with the weights' names where tensors of an adapter have other shapes."""
    try:
        yield
    except RuntimeError as error:  # torch's, of shapes
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the adapter of {', '.join(row.hf)} does not fit the model ({reason}): name the model "
            "that it was made for"
        ) from None


def _copy(target: Tensor, values: Tensor) -> None:
    """Copy without repeating anything to fill the target."""
    if target.shape != values.shape:
        raise RuntimeError(f"it is {tuple(values.shape)}, the model's {tuple(target.shape)}")
    target.copy_(values)


def _join(each: Attached, row: Row, adapters: HFAdapters, dims: Dims) -> tuple[Tensor, Tensor]:
    """Whole factors in Megatron's order from those of the HF layers."""
    if missing := [name for name in row.hf if name not in adapters.factors]:
        raise UserError(f"the adapter has no factors for {', '.join(missing)}")
    parts = [adapters.factors[name] for name in row.hf]
    if isinstance(each.adapter, EmbeddingAdapter):
        (table,) = parts
        return row.layout.join([table.a.t()], dims).t(), table.b
    if any(not torch.equal(part.a, parts[0].a) for part in parts[1:]):
        raise UserError(
            f"{', '.join(row.hf)} are one layer in Megatron, whose adapter has one lora_A, but "
            "here they have different ones: merge the adapter by swift export --merge_lora true"
        )
    return parts[0].a, row.layout.join([part.b for part in parts], dims)


def _lengths(each: Attached, row: Row, adapters: HFAdapters, dims: Dims) -> Tensor:
    """DoRA's lengths of a layer's rows here, from those of the HF layers."""
    magnitude = each.adapter.magnitude
    parts = [adapters.factors[name].magnitude for name in row.hf]
    assert magnitude is not None
    columns = [part[:, None] for part in parts if part is not None]
    if isinstance(each.adapter, EmbeddingAdapter):
        return columns[0][:, 0]
    whole = row.layout.join(columns, dims)
    group = each.adapter.group
    return row.layout.shard(whole, magnitude.axis, group.rank(), group.size())[:, 0]


def _cut(each: Attached, row: Row, factor: Factor, whole: Tensor) -> Tensor:
    if factor.axis is None:
        return whole
    group = each.adapter.group
    if factor.axis - factor.weight.dim() == -2:
        return row.layout.shard(whole, 0, group.rank(), group.size())
    return whole.chunk(group.size(), dim=1)[group.rank()]
