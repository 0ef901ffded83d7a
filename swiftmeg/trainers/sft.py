"""Supervised fine-tuning and pre-training: cross entropy on the tokens that the labels name."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swiftmeg.args.commands import PtArguments, SftArguments
from swiftmeg.models.hf import HFModel
from swiftmeg.trainers.data import prepare_data
from swiftmeg.trainers.method import Method, Run, Training
from swiftmeg.trainers.training_data import TrainingData


class Sft(Method):
    """The objective is the mean loss of the trained tokens of a global batch."""

    arguments = SftArguments

    def prepare_data(self, args: Any, model: HFModel) -> TrainingData:
        return prepare_data(args, model)

    def training(self, run: Run, megatron: Any) -> Training:
        return SftTraining()


class Pt(Sft):
    """Sft with other defaults: every token of plain text is trained."""

    arguments = PtArguments


class SftTraining(Training):
    """Sums of cross entropies."""

    def forward_step(
        self, iterator: Iterator[dict[str, Tensor]], model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        from swiftmeg.trainers.forward import run_model, take_batch  # behind Megatron's import

        batch = take_batch(iterator)
        output = run_model(model, batch)
        factors = {"factors": batch["loss_scale"]} if "loss_scale" in batch else {}
        return output, partial(loss_function, batch["weights"], **factors)


def loss_function(
    weights: Tensor, losses: Tensor, factors: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses [b, s] by their `weights` [b, s], which are 1 or 0, and add these up.

    `factors` [b, s] multiply losses alone. Megatron adds both sums over micro-batches and
    data-parallel ranks and divides once, so the result does not depend on how the global batch is
    split. A micro-batch, a rank's chunks of it or a whole step without a trained token counts as
    zero.
    """
    scale = weights if factors is None else weights * factors
    total = (losses.float() * scale).sum()
    count = weights.sum()
    # Beside any token the addition is lost in rounding; without one it makes 0 / 0 a zero.
    report = torch.stack([total.detach(), count + torch.finfo(count.dtype).tiny])
    return total, count.to(torch.int), {"lm loss": report}
