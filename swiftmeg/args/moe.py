"""Flags of mixture-of-experts layers."""

from dataclasses import dataclass

from swiftmeg.args.megatron import MegatronFlags


@dataclass
class ExpertParallelArguments(MegatronFlags):
    """Expert parallelism"""

    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share every expert. None: --tensor_model_parallel_size."""
