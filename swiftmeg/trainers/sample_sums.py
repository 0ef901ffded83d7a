"""Sums over the trained labels of each sample, whatever ranks and batches its tokens lie in."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor

from swiftmeg.data.template.template import IGNORE
from swiftmeg.trainers.forward import Batch, run_model, take_batch


def sample_sums(values: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Return the sums of each of `values` [b, s] over the trained labels of each sample.

    fp32 [len(values), n] for the n samples of a Collator's batch in their order, on every
    context-parallel rank the sums over all of them. Differentiable; added up in fp64, so that the
    order of tokens and ranks does not show.
    """
    trained = batch["labels"] != IGNORE
    count = int(batch["num_samples"])
    index = (batch["samples"] * trained).reshape(-1)
    stacked = torch.stack([value.double() * trained for value in values])
    sums = stacked.new_zeros(len(values), count + 1)
    sums = sums.index_add(1, index, stacked.flatten(start_dim=1))[:, 1:]
    if mpu.get_context_parallel_world_size() > 1:
        sums = _SumOverChunks.apply(sums)
    return sums.float()


def answers_logps(
    iterator: Iterator[Batch], model: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """A forward step of a pass without gradients that returns the log-probability [n] of each
    sample's trained labels, with their factors (`loss_scale`)."""
    batch = take_batch(iterator)

    def logps(nll: Tensor, non_loss_data: bool = True) -> Tensor:
        value = -nll if "loss_scale" not in batch else -nll * batch["loss_scale"]
        return sample_sums([value], batch)[0]

    return run_model(model, batch), logps


class _SumOverChunks(torch.autograd.Function):
    """The sum over context-parallel ranks, of which each computes the same loss.

    So the gradient of a rank's part is that of the sum; Megatron adds up those of all parts.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        total = sums.clone()
        torch.distributed.all_reduce(total, group=mpu.get_context_parallel_group())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
