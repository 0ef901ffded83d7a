"""Who writes which weight, in layouts with more ranks than a test can start."""

from collections import defaultdict
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftmeg.export.write_shares import Share, _Seat, _share_out

LAYOUTS = [
    (tensor, expert, expert_tensor, world)
    for tensor, expert, expert_tensor, world in product(
        (1, 2, 4, 8), (1, 2, 4), (1, 2, 4), (1, 4, 8, 32)
    )
    if world % tensor == 0 and world % (expert * expert_tensor) == 0
]


def seats(tensor: int, expert: int, expert_tensor: int, world: int) -> list[_Seat]:
    """A pipeline stage's ranks, with the tensor-parallel number running fastest."""
    result = []
    for rank in range(world):
        replica, in_tensor = divmod(rank, tensor)
        rest, in_expert_tensor = divmod(rank, expert_tensor)
        expert_replica, in_expert = divmod(rest, expert)
        result.append(
            _Seat(rank, 0, in_tensor, replica, in_expert, in_expert_tensor, expert_replica)
        )
    return result


def weights(tensor: int, expert_tensor: int) -> list[Any]:
    """Weights of some layers, as a rank holds them: cut ones, whole ones, one expert a rank."""

    def weight(size: int, axis: int | None, routed: bool) -> Any:
        pieces = 1 if axis is None else expert_tensor if routed else tensor
        block = torch.empty(size // pieces, dtype=torch.uint8)
        return SimpleNamespace(tensor=block, axis=axis, routed=routed, pieces=pieces)

    layer = [weight(64, None, False), weight(4096, 0, False), weight(2048, 0, True)]
    return [weight(8192, 0, False), *layer * 12, weight(64, None, False)]


def assigned(layout: tuple[int, int, int, int]) -> tuple[list[_Seat], list[list[Share]]]:
    """For each weight every rank's share of it."""
    ranks = seats(*layout)
    listed = weights(layout[0], layout[2])
    lists = [
        list(_share_out(listed, ranks, own, {seat.rank: 0 for seat in ranks})) for own in ranks
    ]
    return ranks, [list(shares) for shares in zip(*lists, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_rank_writes_a_weight_and_its_group_gathers(layout: tuple[int, int, int, int]) -> None:
    ranks, assignments = assigned(layout)
    for live, shares in zip(weights(layout[0], layout[2]), assignments, strict=True):
        groups: dict[Any, list[tuple[_Seat, Share]]] = defaultdict(list)
        for seat, share in zip(ranks, shares, strict=True):
            groups[seat.expert if live.routed else None].append((seat, share))
        for members in groups.values():  # expert-parallel ranks hold other experts
            ((writer, told),) = [each for each in members if each[1].writes]
            assert told.gathers
            for seat, share in members:
                if live.routed:
                    same = seat.expert_replica == writer.expert_replica
                    receiver = writer.expert_tensor
                else:
                    same, receiver = seat.replica == writer.replica, writer.tensor
                assert share.gathers == same
                assert share.receiver == receiver


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_bytes_are_shared_evenly(layout: tuple[int, int, int, int]) -> None:
    ranks, assignments = assigned(layout)
    listed = weights(layout[0], layout[2])
    load = {
        seat.rank: sum(
            live.tensor.nbytes * live.pieces
            for live, shares in zip(listed, assignments, strict=True)
            if shares[seat.rank].writes
        )
        for seat in ranks
    }
    assert max(load.values()) - min(load.values()) <= 8192
