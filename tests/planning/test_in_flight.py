"""Micro-batches whose activations wait, against Megatron's own schedules."""

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import (
    get_pp_rank_microbatches,
    get_schedule_table,
)

from swiftmeg.planning.memory import _in_flight
from swiftmeg.planning.stages import Stage

CASES = [
    (pipeline, chunks, batches)
    for pipeline in (2, 4, 8)
    for chunks in (1, 2, 3)
    for batches in (pipeline, 2 * pipeline, 4 * pipeline)
]


def waiting(pipeline: int, number: int, chunks: int, batches: int) -> list[int]:
    """For each chunk the micro-batches that wait after the last forward pass of the warm-up and
    the first of the steady phase, when a stage holds the most."""
    size = SimpleNamespace(size=lambda: pipeline, rank=lambda: number)
    virtual = chunks if chunks > 1 else None
    communicator = SimpleNamespace(pp_group=size, virtual_pipeline_model_parallel_size=virtual)
    total, _, warmup, _ = get_pp_rank_microbatches(
        batches, chunks, pipeline, p2p_communicator=communicator
    )
    order = get_schedule_table(batches, chunks, pipeline)[: min(warmup + 1, total)]
    return [sum(chunk == index for _, chunk in order) for index in range(chunks)]


@pytest.mark.parametrize(("pipeline", "chunks", "batches"), CASES)
def test_as_many_wait_as_in_megatrons_schedule(pipeline: int, chunks: int, batches: int) -> None:
    args = SimpleNamespace(pipeline_model_parallel_size=pipeline)
    for number in range(pipeline):
        stage = Stage(number, (None,) * chunks)  # type: ignore[arg-type]
        found = [_in_flight(args, stage, chunk, batches) for chunk in range(chunks)]  # type: ignore[arg-type]
        assert found == waiting(pipeline, number, chunks, batches), number
