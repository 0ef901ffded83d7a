"""The parameters of an adapter, and how tensor parallelism cuts them."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Factor(torch.nn.Module):
    """One factor: `weight`, [out, in] or, for experts, [experts here, out, in].

    `axis` is the axis that tensor parallelism cuts, None where every rank holds all of it.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        like: Tensor,
        axis: int | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        values = torch.zeros(shape, dtype=dtype or like.dtype, device=like.device)
        weight: Any = torch.nn.Parameter(values)
        weight.allreduce = getattr(like, "allreduce", True)
        weight.tensor_model_parallel = axis is not None
        if axis is not None:
            weight.partition_dim, weight.partition_stride = axis, 1
        self.weight = weight
        self.axis = axis

    def sum_over_positions(self) -> None:
        """Let Megatron add up the gradients that ranks find at their own positions."""
        self.weight.sequence_parallel = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] gives [..., out]."""
        return F.linear(x, self.weight)


class Magnitude(Factor):
    """DoRA's lengths of a weight's rows [out], in fp32: bfloat16 would change them by 0.4 %."""

    def __init__(self, out: int, like: Tensor, axis: int | None) -> None:
        super().__init__((out,), like, axis, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the module, but keep its numbers in fp32."""

        def exact(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(exact, recurse)
