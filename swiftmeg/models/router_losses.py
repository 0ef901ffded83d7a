"""The router's losses: statistics over samples that ranks share."""

from typing import Any

import torch
from torch import Tensor

_BITS = 32
"""Of a mark, those below the sample's number: the bits of a float32."""


def token_marks(samples: Tensor, weights: Tensor, count: int) -> Tensor:
    """What routers have to know of each token, as `padding_mask` of Megatron's GPT model.

    `samples` [b, s] numbers the `count` samples of a micro-batch from 1 and is 0 on padding;
    `weights` [b, s] (float32, not negative) are what labels count for in the objective. Returns
    int64 [b, s]: the number in the upper half, the bits of the weight in the lower.
    """
    Samples.most = max(Samples.most, count)
    return samples.long() << _BITS | weights.contiguous().view(torch.int32).long()


class Samples:
    """Which sample each of this rank's tokens belongs to, and what a sample weighs.

    A sample's tokens may lie on several ranks of `group`. Indices run over the tokens here, [t],
    or over samples, [n + 1], whose entry 0 is the padding's.
    """

    most = 1
    """No micro-batch so far had more samples. Ranks of a group, which see the same micro-batches,
    must agree on n, and a number on the host spares the GPU a wait."""

    def __init__(self, marks: Tensor, group: Any) -> None:
        self.index = marks >> _BITS
        self.real = self.index > 0
        self.weight = (marks & (1 << _BITS) - 1).to(torch.int32).view(torch.float32)
        self.group = group
        counts = self._sum(torch.stack([self.real.float(), self.weight], dim=1))
        self.tokens_per_sample, self.weight_per_sample = counts[:, 0], counts[:, 1]

    @classmethod
    def of(cls, marks: Tensor | None, logits: Tensor, group: Any) -> "Samples":
        """From `token_marks` [s, b], or with a sample a column of `logits` [s, b, experts]."""
        if marks is None:
            rows, columns = logits.shape[:2]
            numbers = torch.arange(1, columns + 1, device=logits.device).expand(rows, columns)
            marks = token_marks(numbers, torch.ones_like(numbers, dtype=torch.float32), columns)
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
        """This rank's share of the sum over samples of (mean of `values` [t]) x (sample's weight).

        Divided by the weights of the global batch, sums over ranks and micro-batches are a mean
        over what is trained on: tokens, or samples.
        """
        weights = self.weight_per_sample / self.tokens_per_sample.clamp(min=1)
        return (values * weights[self.index] * self.real).sum()
