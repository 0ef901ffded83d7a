"""Megatron checkpoints written one weight at a time, for conversion.

Megatron's own way keeps a copy of much that it writes, which lets training go on meanwhile; a
conversion has nothing to go on with.
"""

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed import checkpoint


class StreamingSave(torch_dist.TorchDistSaveShardedStrategy):
    """Write a torch_dist checkpoint with torch's own writer: one tensor in memory at a time."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Write this rank's shards of `sharded_state_dict`; collective."""
        entries, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        checkpoint.save(
            torch_dist.mcore_to_pyt_state_dict(entries, False),
            storage_writer=checkpoint.FileSystemWriter(checkpoint_dir, sync_files=False),
            planner=torch_dist.MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )
