"""The weights of a Megatron checkpoint, read one at a time into live models of any layout."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from swiftmeg.checkpoint import read_common_state, read_entry, read_iteration
from swiftmeg.errors import UserError
from swiftmeg.export.hf_files import listed
from swiftmeg.export.lazy_weights import storage_of
from swiftmeg.export.shards import LiveWeight
from swiftmeg.unpickling import INDEX, read_index

_NOT_WEIGHTS = "optimizer."
"""How the names of what a run keeps beside its weights begin."""

_Wanted = tuple[ChunkStorageMetadata, torch.Tensor]
"""A block of a stored tensor, and where its values go."""


class CheckpointSupply:
    """The weights of one iteration, cut as they are needed, whatever layout wrote them.

    Megatron's own reader fills all of a model and holds a second copy of much of it. This one reads
    what a single weight needs, checks it against its checksum and writes it into the weight.
    """

    def __init__(self, models: list[Any], folder: Path) -> None:
        self._bytes_read = 0
        self._folder = folder / read_iteration(folder)
        self._index = read_index(self._folder / INDEX)
        content = dist_checkpointing.load_content_metadata(
            preloaded_state_dict=read_common_state(self._folder)
        )
        ranks = mpu.get_data_parallel_group(with_context_parallel=True)
        metadata = {**(content or {}), "dp_cp_group": ranks}
        self._used: set[str] = set()
        self._by_place: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._entries: dict[int, list[ShardedTensor]] = defaultdict(list)
        for chunk in unwrap_model(models):
            entries, _, _ = load_preprocess(chunk.sharded_state_dict(metadata=metadata))
            for entry in nested_values(entries):
                if isinstance(entry, ShardedTensor):
                    self._entries[storage_of(entry.data)].append(entry)

    def fill(self, live: LiveWeight) -> None:
        """Read one weight; UserError, naming entry or file, if it is not there or damaged."""
        self._read(live, {live.rank: live.tensor})

    def shards(self, live: LiveWeight) -> list[torch.Tensor]:
        """Read all shards of one weight; what they share in the checkpoint is read once."""
        found = {rank: torch.empty_like(live.tensor, device="cpu") for rank in range(live.pieces)}
        self._read(live, found)
        return list(found.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of stored pieces that this rank has read."""
        return self._bytes_read

    def finish(self) -> None:
        """UserError if the checkpoint holds weights that no rank took; collective."""
        taken: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(taken, self._used)
        found = {
            name
            for name, each in self._index.state_dict_metadata.items()
            if isinstance(each, TensorStorageMetadata) and not name.startswith(_NOT_WEIGHTS)
        }
        if left := found.difference(*taken):
            raise UserError(
                f"{self._folder}: no parameter took the weights of {listed(left)}: "
                "name the model that the checkpoint comes from"
            )

    def _read(self, live: LiveWeight, shards: dict[int, torch.Tensor]) -> None:
        """Read shards of a weight, by their numbers in its group."""
        wanted: dict[str, list[_Wanted]] = defaultdict(list)
        for entry in self._entries[storage_of(live.tensor)]:
            for rank, shard in shards.items():
                wanted[entry.key].append(_wanted(entry, live, rank, shard))
        for entry in self._entries[storage_of(live.tensor)]:
            if entry.key in wanted:
                self._read_entry(entry, wanted.pop(entry.key))

    def _read_entry(self, entry: ShardedTensor, wanted: list[_Wanted]) -> None:
        """Read blocks of the tensor that `entry` is a part of, each stored piece of it once."""
        stored = self._index.state_dict_metadata.get(entry.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"{self._folder} holds no weight {entry.key}, which the model has")
        if tuple(stored.size) != tuple(entry.global_shape) and not entry.allow_shape_mismatch:
            raise UserError(
                f"{self._folder}: {entry.key} is {tuple(stored.size)}, but the model's is "
                f"{tuple(entry.global_shape)}"
            )
        self._used.add(entry.key)
        if entry.allow_shape_mismatch:
            for _, data in wanted:  # the vocabulary's padding; there may be more than was stored
                data.zero_()
        axes = entry.prepend_axis_num
        places = self._pieces(entry.key, stored, axes)
        near = dataclasses.replace(stored, chunks=places[wanted[0][0].offsets[:axes]])
        items = create_read_items_for_chunk_list(entry.key, near, [place for place, _ in wanted])
        items.sort(key=lambda item: item.storage_index.offset or ())
        filled = 0
        for index, same in itertools.groupby(items, lambda item: item.storage_index):
            archive = self._archive(index)
            for item in same:
                piece = _part(archive, item.storage_offsets, item.lengths)
                data = wanted[item.dest_index.index or 0][1]
                _part(data, item.dest_offsets, item.lengths).copy_(piece)
                filled += piece.numel()
        if filled != sum(data.numel() for _, data in wanted) and not entry.allow_shape_mismatch:
            raise UserError(f"{self._folder}: parts of {entry.key} are missing")

    def _pieces(
        self, key: str, stored: TensorStorageMetadata, axes: int
    ) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """The stored pieces of a tensor by their place on the first axes: layers and experts.

        Looking through all for each would take minutes where there are thousands.
        """
        if key not in self._by_place:
            found = self._by_place[key] = defaultdict(list)
            for piece in stored.chunks:
                assert all(size == 1 for size in piece.sizes[:axes]), f"{key}: {piece}"
                found[tuple(piece.offsets)[:axes]].append(piece)
        return self._by_place[key]

    def _archive(self, index: MetadataIndex) -> torch.Tensor:
        place = self._index.storage_data[index]
        content = read_entry(self._folder, place)
        self._bytes_read += place.length
        tensor: torch.Tensor = torch.load(content, map_location="cpu", weights_only=True)
        return tensor


def _wanted(entry: ShardedTensor, live: LiveWeight, rank: int, shard: torch.Tensor) -> _Wanted:
    """Where `entry`, which describes this rank's shard, would be in another's; and its memory."""
    offsets = list(entry.global_offset)
    if live.axis is not None:
        steps = rank - live.rank
        offsets[entry.prepend_axis_num + live.axis] += steps * entry.local_shape[live.axis]
    view = entry.data.detach()
    start = view.storage_offset() - live.tensor.storage_offset() + shard.storage_offset()
    data = shard.detach().as_strided(view.shape, view.stride(), start)
    shape = torch.Size((1,) * entry.prepend_axis_num + tuple(entry.local_shape))
    return ChunkStorageMetadata(torch.Size(offsets), shape), data.view(shape)


def _part(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """The block of a tensor that begins at `offsets`, a view."""
    for axis, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, offset, length)
    return tensor
