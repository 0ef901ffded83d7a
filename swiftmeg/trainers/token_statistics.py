"""What whole logits say of each token beside its loss: for logs, and for weights of pairs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

_BLOCK_ELEMENTS = 1 << 26
"""Logits that are turned into fp32 at a time."""


@dataclass
class TokenStatistics:
    """Numbers of each token's distribution, fp32 [b, s], without gradient."""

    entropy: Tensor
    """In nats."""
    mean_logit: Tensor
    """Over the vocabulary."""
    log_collision: Tensor
    """The logarithm of the sum of squared probabilities."""
    is_likeliest: Tensor
    """1 where no logit is larger than the label's, else 0."""


class LogitsWatch:
    """Computes TokenStatistics of what a model part's output layer returns, when it is asked to."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._labels: Tensor | None = None
        self._found: TokenStatistics | None = None

    def attach(self, model: Any) -> None:
        """Watch a bare GPTModel; a part without an output layer is left alone."""
        if model.post_process:
            model.output_layer.register_forward_hook(self._look)

    def want(self, labels: Tensor) -> None:
        """Look at the next logits, whose labels are `labels` [b, s]."""
        self._labels = labels

    def take(self) -> TokenStatistics:
        """What was found since `want`."""
        found, self._found, self._labels = self._found, None, None
        assert found is not None
        return found

    def _look(self, module: Any, inputs: Any, output: Any) -> None:
        if self._labels is not None:
            from megatron.core import mpu

            group = mpu.get_tensor_model_parallel_group()
            self._found = token_statistics(output[0], self._labels, self.vocab_size, group)


@torch.no_grad()
def token_statistics(
    logits: Tensor, labels: Tensor, vocab_size: int, group: torch.distributed.ProcessGroup
) -> TokenStatistics:
    """Statistics of this rank's columns `logits` [s, b, v] and those of the other ranks of `group`.

    `labels` [b, s] are ids. Columns from `vocab_size` on pad the vocabulary and hold the smallest
    number.
    """
    columns = logits.shape[-1]
    first = columns * group.rank()
    words = max(0, min(columns, vocab_size - first))
    rows = logits.detach().reshape(-1, columns)
    wanted = labels.t().reshape(-1) - first
    size = max(1, _BLOCK_ELEMENTS // columns)
    starts = range(0, len(rows), size)
    blocks = [_sums(rows[i : i + size], wanted[i : i + size], words) for i in starts]
    largest, *sums = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    if group.size() > 1:
        mine = largest.clone()
        torch.distributed.all_reduce(largest, ReduceOp.MAX, group=group)
        shrink = (mine - largest).exp()
        sums = [sums[0] * shrink, sums[1] * shrink, sums[2] * shrink**2, *sums[3:]]
        joined = torch.stack(sums)
        torch.distributed.all_reduce(joined, group=group)
        sums = list(joined.unbind())
    total, weighted, squares, plain, target = sums
    found = TokenStatistics(
        entropy=total.log() + largest - weighted / total,
        mean_logit=plain / vocab_size,
        log_collision=squares.log() - 2 * total.log(),
        is_likeliest=(target >= largest).float(),
    )
    shape = logits.shape[:2]
    for name, value in vars(found).items():
        setattr(found, name, value.view(shape).t().contiguous())
    return found


def _sums(block: Tensor, wanted: Tensor, words: int) -> tuple[Tensor, ...]:
    """The largest logit of each row of [t, v]; of exponentials beside it the sum, the sum weighted
    by logits and that of squares; the sum of logits; the logit in column `wanted`, or 0."""
    x = block.float()
    largest = x.max(dim=-1).values
    exponentials = (x - largest[:, None]).exp()
    weighted = (exponentials * x).sum(dim=-1)
    here = (wanted >= 0) & (wanted < x.shape[-1])
    target = x.gather(1, wanted.clamp(0, x.shape[-1] - 1)[:, None])[:, 0] * here
    return (
        largest,
        exponentials.sum(dim=-1),
        weighted,
        exponentials.square().sum(dim=-1),
        x[:, :words].sum(dim=-1),
        target,
    )
