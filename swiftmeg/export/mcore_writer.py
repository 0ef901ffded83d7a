"""Megatron checkpoints written one weight at a time, for conversion.

Megatron's own way keeps a copy of much that it writes, which lets training go on meanwhile; a
conversion has nothing to go on with.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import (
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from swiftmeg.errors import UserError
from swiftmeg.export.lazy_weights import Weights, storage_of
from swiftmeg.export.torch_archive import write_tensor


class StreamingSave(torch_dist.TorchDistSaveShardedStrategy):
    """Write a torch_dist checkpoint with torch's planning and one weight in memory at a time."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Write this rank's shards of `sharded_state_dict`; collective.

        UserError, on every rank, for what the weights' source finds wrong; OSError likewise.
        """
        entries, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        planned = torch_dist.mcore_to_pyt_state_dict(entries, False)
        planner = _Planner(entries, self._weights)
        try:
            with self._weights.in_turn():
                checkpoint.save(planned, storage_writer=_Writer(checkpoint_dir), planner=planner)
        except CheckpointException as error:
            for cause, _ in error.failures.values():
                if isinstance(cause, (UserError, OSError)):
                    raise cause from None
            raise


class SharedOut(FullyParallelSaveStrategyWrapper):
    """Megatron's way of sharing replicas out over ranks, but all parts of a weight to one rank.

    Gate and up projections are two tensors of a checkpoint and one weight.
    """

    def apply_saving_parallelization(self, sharded_state_dict: dict[str, Any]) -> None:
        shares = determine_main_replica_uniform_distribution(
            sharded_state_dict, self.parallelization_group
        )
        if shares is not None:
            weights: dict[int, list[Any]] = defaultdict(list)
            for entry in nested_values(sharded_state_dict):
                if isinstance(entry, ShardedTensor):
                    weights[storage_of(entry.data)].append(_sharded_tensor_shard_id(entry))
            ranks = shares.main_rank_for_shard
            for parts in weights.values():
                if (first := min(parts)) in ranks:  # not so where other groups write all of it
                    ranks.update(dict.fromkeys(parts, ranks[first]))
        distribute_main_replicas_with_precomputed_distribution(
            sharded_state_dict, self.parallelization_group, shares
        )


class _Planner(torch_dist.MCoreSavePlanner):
    """Megatron's plan, whose tensors get their values when their turn comes."""

    def __init__(self, entries: dict[str, list[Any]], weights: Weights) -> None:
        super().__init__(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        self._weights = weights
        self._tensors = {
            (key, tuple(shard.global_offset)): shard.data
            for key, shards in entries.items()
            for shard in shards
            if isinstance(shard, ShardedTensor)
        }

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        index = write_item.index
        return self._weights.values(self._tensors[index.fqn, tuple(index.offset or ())])


class _Writer(checkpoint.FileSystemWriter):
    """torch's writer without its second copy of views and its hold on what is written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        with (Path(self.path) / name).open("wb") as file:
            for item in plan.items:
                start = file.tell()
                data: Any = planner.resolve_data(item)
                if item.type == WriteItemType.BYTE_IO:
                    file.write(data.getbuffer())
                else:
                    write_tensor(data.detach().cpu(), file)
                length = file.tell() - start
                place = _StorageInfo(name, start, length)
                results.append(WriteResult(item.index, length, place))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
