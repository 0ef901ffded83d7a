"""Assign every weight to one of the ranks that hold it, which writes it: evenly, by bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import mpu

from swiftmeg.export.shards import LiveWeight


@dataclass(frozen=True)
class Share:
    """This rank's part in writing one of its weights."""

    gathers: bool
    """True on the ranks of the replica whose shards are gathered into the full weight."""
    receiver: int
    """Rank, within the weight's group, that receives the shards."""
    writes: bool
    """True on the rank that writes the weight."""


@dataclass(frozen=True)
class _Seat:
    """A rank's number in every group that cuts or repeats weights."""

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
        size = live.tensor.nbytes * live.pieces
        if live.routed:
            for expert in experts:
                seat = _least([s for s in seats if s.expert == expert], load, size)
                if expert == own.expert:
                    writer, receiver = seat, seat.expert_tensor
            gathers = writer.expert_replica == own.expert_replica
        else:
            writer = _least(seats, load, size)
            receiver, gathers = writer.tensor, writer.replica == own.replica
        yield Share(gathers, receiver, writer.rank == own.rank)


def _least(seats: list[_Seat], load: dict[int, int], size: int) -> _Seat:
    seat = min(seats, key=lambda seat: load[seat.rank])
    load[seat.rank] += size
    return seat
