"""Norms of the native backend."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32 (arXiv:1910.07467).

    Under sequence parallelism each rank sees its own positions only; the mark on `weight` makes
    Megatron sum its gradient over the tensor-parallel group. With zero-centred gamma the weight is
    what the factor differs from one by.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = torch.nn.Parameter(
            torch.full(
                (hidden_size,),
                1.0 - self.offset,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape [..., hidden_size]."""
        if not self.offset:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # The sum has more digits than half precision holds.
        weight = self.weight.float() + self.offset
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
