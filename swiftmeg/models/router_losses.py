"""The router's losses: statistics over samples that ranks share."""

from typing import Any

import torch
from torch import Tensor


class Samples:
    """Which sample each of this rank's tokens belongs to, and how many of a sample are trained.

    A sample's tokens may lie on several ranks of `group`. Indices run over the tokens here, [t],
    or over samples, [n + 1], whose entry 0 is the padding's.
    """

    most = 1
    """No micro-batch so far had more samples. Ranks of a group, which see the same micro-batches,
    must agree on n, and a number on the host spares the GPU a wait."""

    def __init__(self, marks: Tensor, group: Any) -> None:
        self.index = marks // 2
        self.real = self.index > 0
        self.trained = (marks % 2).float()
        self.group = group
        counts = self._sum(torch.stack([self.real.float(), self.trained], dim=1))
        self.tokens_per_sample, self.trained_per_sample = counts[:, 0], counts[:, 1]

    @classmethod
    def of(cls, marks: Tensor | None, logits: Tensor, group: Any) -> "Samples":
        """From `marks` [s, b], or taking every column of `logits` [s, b, experts] for a sample."""
        if marks is None:
            rows, columns = logits.shape[:2]
            cls.most = max(cls.most, columns)
            each = 2 * torch.arange(1, columns + 1, device=logits.device) + 1
            marks = each.expand(rows, columns)
        return cls(marks.reshape(-1), group)

    def _sum(self, values: Tensor) -> Tensor:
        """[t, k] summed over the tokens of each sample on all ranks, [n + 1, k]."""
        total = values.new_zeros(Samples.most + 1, values.shape[1])
        total.index_add_(0, self.index, values)
        if self.group.size() > 1:
            torch.distributed.all_reduce(total, group=self.group)
        return total

    def mean_per_sample(self, values: Tensor) -> Tensor:
        """For each token the mean of `values` [t, k], without gradient, over its sample: [t, k]."""
        means = self._sum(values) / self.tokens_per_sample.clamp(min=1)[:, None]
        return means[self.index]

    def mean(self, values: Tensor) -> Tensor:
        """This rank's share of the sum over samples of (mean of `values` [t]) x (trained tokens).

        Divided by the trained tokens of the global batch, sums over ranks and micro-batches are a
        mean over trained tokens.
        """
        weights = self.trained_per_sample / self.tokens_per_sample.clamp(min=1)
        return (values * weights[self.index] * self.real).sum()
