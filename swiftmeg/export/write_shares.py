"""Who writes what: every rank that holds a weight can write it, and the work is shared evenly."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import mpu

from swiftmeg.export.shards import LiveWeight


@dataclass(frozen=True)
class Share:
    """This rank's part in writing one of its weights."""

    gathers: bool
    """It belongs to the replica that puts the weight together."""
    place: int
    """The number, in the weight's group, of the rank that receives the shards."""
    writes: bool
    """It is that rank."""


@dataclass(frozen=True)
class _Seat:
    """Where a rank stands in every group that cuts or repeats weights."""

    rank: int
    stage: int
    tensor: int
    replica: int
    expert: int
    expert_tensor: int
    expert_replica: int


def _seats() -> list[_Seat]:
    """The seats of all ranks of this pipeline stage, in the order of ranks."""
    own = _Seat(
        torch.distributed.get_rank(),
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_data_parallel_rank(with_context_parallel=True),
        mpu.get_expert_model_parallel_rank(),
        mpu.get_expert_tensor_parallel_rank(),
        mpu.get_expert_data_parallel_rank(),
    )
    seats: list[_Seat | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seats, own)
    return [seat for seat in seats if seat is not None and seat.stage == own.stage]


def shares(weights: list[LiveWeight]) -> list[Share]:
    """This rank's share of each of its weights; collective.

    Every rank of a stage walks through the same list and gives each weight to the rank with the
    fewest bytes so far, so all know who writes what without asking.
    """
    seats = _seats()
    (own,) = (seat for seat in seats if seat.rank == torch.distributed.get_rank())
    load = dict.fromkeys((seat.rank for seat in seats), 0)
    return list(_share_out(weights, seats, own, load))


def _share_out(
    weights: list[LiveWeight], seats: list[_Seat], own: _Seat, load: dict[int, int]
) -> Iterator[Share]:
    experts = sorted({seat.expert for seat in seats})
    for live in weights:
        size = live.tensor.nbytes * (live.place[1] if live.axis is not None else 1)
        if live.routed:
            for expert in experts:
                seat = _least([s for s in seats if s.expert == expert], load, size)
                if expert == own.expert:
                    writer, place = seat, seat.expert_tensor
            gathers = writer.expert_replica == own.expert_replica
        else:
            writer = _least(seats, load, size)
            place, gathers = writer.tensor, writer.replica == own.replica
        yield Share(gathers, place, writer.rank == own.rank)


def _least(seats: list[_Seat], load: dict[int, int], size: int) -> _Seat:
    seat = min(seats, key=lambda seat: load[seat.rank])
    load[seat.rank] += size
    return seat
