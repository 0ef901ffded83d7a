"""Context parallelism: which tokens of a batch a rank holds, and how it gets the others' keys.

A segment (a row of a padded batch or a sample of a packed one) is cut into 2 * size chunks, and
rank r holds chunk r followed by chunk 2 * size - 1 - r: under a causal mask early chunks are cheap
and late ones dear, so that all ranks have equal work. TransformerEngine and Megatron's rotary
embeddings expect the same order. Segment lengths must be multiples of 2 * size.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def held(borders: Tensor, total: int, rank: int, size: int) -> Tensor:
    """Places in the whole batch of the tokens that `rank` of `size` holds: int64 [total / size].

    `borders` [segments + 1] are the segments' first places and, last, `total`.
    """
    segment, positions = _segments_and_positions(borders, total // size, rank, size)
    return borders[segment].long() + positions


def positions(borders: Tensor, local: int, rank: int, size: int) -> Tensor:
    """Positions in their segments of the `local` tokens that `rank` of `size` holds: int64 [local].

    `borders` are those of `held`. Nothing waits for the GPU.
    """
    return _segments_and_positions(borders, local, rank, size)[1]


def _segments_and_positions(
    borders: Tensor, local: int, rank: int, size: int
) -> tuple[Tensor, Tensor]:
    starts, lengths = borders[:-1].long(), borders.diff().long()
    segment = torch.repeat_interleave(lengths // size, output_size=local)
    offset = torch.arange(local, device=borders.device) - starts[segment] // size
    if size == 1:
        return segment, offset
    chunk = (lengths // (2 * size))[segment]
    late = (2 * size - 2 - rank) * chunk  # added to an offset that is one chunk long already
    return segment, offset + torch.where(offset < chunk, rank * chunk, late)


def cut_batch(batch: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """The part of a micro-batch that `rank` of `size` holds: of its tensors [b, s], all of them.

    Others, `cu_seqlens` among them, stay whole; a batch without it is cut along each row.
    """
    total = batch["input_ids"].shape[1]
    borders = batch.get("cu_seqlens")
    if borders is None:
        borders = torch.tensor([0, total], device=batch["input_ids"].device)
    places = held(borders, total, rank, size)
    names = ("input_ids", "labels", "position_ids", "samples", "weights", "loss_scale")
    cut = {name: batch[name][:, places] for name in names if name in batch}
    return batch | cut


def gather(local: Tensor, borders: Tensor, group: Any) -> Tensor:
    """Join [t / size, ...] of all ranks to [t, ...], in the order of the batch.

    The backward pass sums every rank's gradients and hands each its own places.
    """
    size = group.size()
    joined = gather_from_sequence_parallel_region(local, True, group)
    total = joined.shape[0]
    places = torch.cat([held(borders, total, rank, size) for rank in range(size)])
    return joined[torch.argsort(places)]
