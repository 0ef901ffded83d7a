"""What a model's parts report of a training step beside the loss: weighted sums, for the log."""

import torch
from torch import Tensor


class StepLosses:
    """Adds up what is reported in a step over layers, micro-batches and ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, count: Tensor) -> None:
        """Add `value`, a sum of terms whose weights in the objective add up to `count`."""
        pair = torch.stack([value.detach().double(), count.double()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def take(self, names: list[str]) -> dict[str, float]:
        """Weighted means over layers and samples since the last call; on every rank of the job."""
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
        pairs = torch.stack([self.sums.get(name, nothing) for name in names])
        self.sums = {}
        torch.distributed.all_reduce(pairs)
        return {
            name: value / max(count, 1.0)
            for name, (value, count) in zip(names, pairs.tolist(), strict=True)
        }


LOSSES = StepLosses()
"""What this process reports."""
