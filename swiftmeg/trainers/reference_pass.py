"""A forward pass of the reference over stored pairs, in any layout; killed, it continues."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from megatron.core import mpu
from torch import Tensor

from swiftmeg import distributed
from swiftmeg.data.encoded.packing import pack
from swiftmeg.data.encoded.tokens import PairDataset
from swiftmeg.errors import UserError
from swiftmeg.global_batch import Forward
from swiftmeg.trainers.method import Run

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Measure = Callable[[Forward], list[Tensor]]
"""Runs a model: the log-probabilities [n] of the samples of each micro-batch that the Forward goes
through, on the last pipeline stage; elsewhere []."""

ROUND = 8
"""Micro-batches of a rank between two moments at which what is there is written."""

_PROGRESS_SECONDS = 30


def reference_logps(
    folder: Path, pairs: PairDataset, run: Run, megatron: Any, models: list[Any], measure: Measure
) -> Array:
    """Return the log-probabilities of both answers of each stored pair, float32 [2 * pairs].

    Collective, and the same everywhere. What was measured before the pass was killed is taken from
    a file beside `folder`, which the first process writes.
    """
    batches = _batches(pairs, run)
    longest = _longest(batches, pairs, run)
    with _partial_file(folder, 2 * len(pairs)) as values:
        missing = distributed.from_rank_zero([] if values is None else _missing(values, batches))
        said = time.monotonic()
        per_round = mpu.get_data_parallel_world_size() * _round_size()
        for start in range(0, len(missing), per_round):
            numbers = missing[start : start + per_round]
            chosen = [batches[k] for k in numbers]
            found = _round(chosen, pairs, run, megatron, models, measure, longest)
            if values is not None:
                for places, logps in found:
                    values[places] = logps
                values.flush()
                if time.monotonic() - said > _PROGRESS_SECONDS:
                    said = time.monotonic()
                    done = len(batches) - len(missing) + start + len(numbers)
                    logger.info("reference: %d of %d micro-batches", done, len(batches))
        result: Array = distributed.from_rank_zero(np.empty(0) if values is None else +values)
    if not np.isfinite(result).all():
        index = int((~np.isfinite(result)).argmax()) // 2
        raise UserError(
            f"the reference model gives pair {index + 1} of the encoded ones no finite "
            "log-probability: check its weights, or train with --torch_dtype bfloat16 or float32"
        )
    return result


def _batches(pairs: PairDataset, run: Run) -> list[list[int]]:
    """The pairs of each micro-batch: no more tokens than in training's largest, or no more pairs
    where these are padded."""
    size = run.args.precompute_ref_batch_size or run.args.micro_batch_size
    if not run.data.collate.padding_free:
        return [list(range(k, min(k + size, len(pairs)))) for k in range(0, len(pairs), size)]
    lengths = pairs.lengths().tolist()
    return pack(lengths, size * max(lengths))


def _missing(values: Array, batches: list[list[int]]) -> list[int]:
    """The micro-batches of which something is not known."""
    known = np.isfinite(values)
    return [k for k, batch in enumerate(batches) if not known[_places(batch)].all()]


def _places(batch: list[int]) -> Array:
    """Where the answers of pairs stand."""
    first = 2 * np.array(batch)
    return np.stack([first, first + 1], axis=1).reshape(-1)


def _round_size() -> int:
    """Micro-batches of a rank in a round: interleaved stages want a multiple of their number."""
    stages = mpu.get_pipeline_model_parallel_world_size()
    return int(-(-ROUND // stages) * stages)


def _round(
    batches: list[list[int]],
    pairs: PairDataset,
    run: Run,
    megatron: Any,
    models: list[Any],
    measure: Measure,
    longest: int,
) -> list[tuple[Array, Array]]:
    """Measure micro-batches, at most a round; returns places and values on every process."""
    ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    mine = batches[rank::ranks]
    rows = [[pairs[index] for index in batch] for batch in mine]
    rows += [[run.data.filler(pairs[0])]] * (_round_size() - len(mine))
    collate = run.data.collate
    if collate.fixed_length is not None:
        collate = copy(collate)
        collate.fixed_length = longest
    forward = partial(_forward, models, [collate(each) for each in rows], megatron)
    logps = measure(forward)
    found = []
    if logps and mpu.get_tensor_model_parallel_rank() == mpu.get_context_parallel_rank() == 0:
        found = [
            (_places(batch), values.float().cpu().numpy())
            for batch, values in zip(mine, logps, strict=False)
        ]
    return [each for part in distributed.gathered(found) for each in part]


def _longest(batches: list[list[int]], pairs: PairDataset, run: Run) -> int:
    """The most tokens of a row of the micro-batches, with the padding that the layout wants."""
    collate = run.data.collate
    sides = pairs.sides.lengths()
    sides = -(-sides // collate.segment_multiple) * collate.segment_multiple
    chosen = (sides[_places(batch)] for batch in batches)
    longest = max(int(each.sum() if collate.padding_free else each.max()) for each in chosen)
    return -(-longest // collate.pad_to_multiple_of) * collate.pad_to_multiple_of


def _forward(
    models: list[Any],
    batches: list[dict[str, Tensor]],
    megatron: Any,
    step: Any,
    others: list[Any] | None = None,
) -> list[Any]:
    """A Forward through `models`, or others, on given micro-batches."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    parts = others or models
    iterators = [iter(batches) for _ in parts]
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(parts) > 1 else iterators[0],
            model=parts,
            num_microbatches=len(batches),
            seq_length=megatron.seq_length,
            micro_batch_size=megatron.micro_batch_size,
            decoder_seq_length=megatron.decoder_seq_length,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return list(found)


@contextmanager
def evaluating(models: list[Any], megatron: Any) -> Iterator[None]:
    """Let `models` run without dropout, and without waiting for weights of an optimizer's step."""
    overlapped = megatron.overlap_param_gather
    for model in models:
        model.eval()
        if overlapped:
            model.disable_forward_pre_hook(param_sync=False)
    try:
        yield
    finally:
        for model in models:
            if overlapped:
                model.enable_forward_pre_hook()
            model.train()


@contextmanager
def _partial_file(folder: Path, size: int) -> Iterator[np.memmap[Any, Any] | None]:
    """On the first process the values found so far, float32 [size], NaN where there is none yet.

    The file is removed when all is well. Another job that measures the same has one of its own.
    """
    if not distributed.on_rank_zero():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.pass-lock"))
    path = folder.with_name(f".{folder.name}.part")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        path = folder.with_name(f".{folder.name}.part-{secrets.token_hex(4)}")
    try:
        if not path.exists() or path.stat().st_size != 4 * size:
            np.full(size, np.nan, dtype=np.float32).tofile(path)
        yield np.memmap(path, dtype=np.float32, mode="r+")
        path.unlink()
    finally:
        lock.release()
