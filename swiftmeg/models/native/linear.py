"""Linear layers that Megatron's local backend lacks."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ReplicatedLinear(torch.nn.Module):
    """A linear layer without bias that every tensor-parallel rank holds whole.

    Under sequence parallelism each rank sees its own positions only; the mark on `weight` makes
    Megatron sum its gradient over the tensor-parallel group.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(
                output_size,
                input_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)
        self.weight.allreduce = True  # type: ignore[attr-defined]
        self.weight.tensor_model_parallel = False  # type: ignore[attr-defined]
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., input_size] to [..., output_size], and the bias that it does not have."""
        return F.linear(x, self.weight), None
