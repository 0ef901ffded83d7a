"""DPO inside Megatron's loop: sums of log-probabilities, the loss of pairs, what is logged.

Both sides of a pair are samples of one micro-batch, so a forward pass gives all that the pair's
loss needs but numbers of the reference (`ref_logps`, one for each sample) and of the rest of the
global batch. These are put into the micro-batches before the model sees them (`_complete`).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor

from swiftmeg.data.template.template import IGNORE
from swiftmeg.global_batch import Forward, WholeBatch
from swiftmeg.models.head import TokenStatistics
from swiftmeg.observer import Observer
from swiftmeg.trainers.dpo_losses import (
    Objective,
    PairSums,
    answer_weight,
    gradients,
    pair_losses,
    pair_metrics,
)
from swiftmeg.trainers.forward import Batch, run_model, take_batch
from swiftmeg.trainers.frozen_model import live_reference
from swiftmeg.trainers.live_reference import LiveReference
from swiftmeg.trainers.method import Hook, Run, Training
from swiftmeg.trainers.reference import StoredReference
from swiftmeg.trainers.sample_sums import sample_sums


class DpoTraining(Training):
    """What one run of DPO does."""

    def __init__(self, run: Run, megatron: Any) -> None:
        self.objective = Objective.of(run.args)
        self.reference: LiveReference | None = None
        if not run.args.reference_free:
            first = run.args.precompute_ref_log_probs
            self.reference = (StoredReference if first else live_reference)(run, megatron)

    def hooks(self) -> list[Hook]:
        return [] if self.reference is None else self.reference.hooks()

    def observers(self) -> list[Observer]:
        return [] if self.reference is None else [self.reference]

    def whole_batch(self) -> WholeBatch | None:
        return self._complete

    def forward_step(
        self, iterator: Iterator[Batch], model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        batch = take_batch(iterator)
        statistics = TokenStatistics()
        return run_model(model, batch, statistics), partial(self._loss, batch, statistics)

    def _loss(
        self, batch: Batch, statistics: TokenStatistics, nll: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        sums = pair_sums(batch, nll, statistics, self.objective)
        real = (sums.chosen_tokens > 0) & (sums.rejected_tokens > 0)  # others fill up
        if "slopes" in batch:
            slopes = batch["slopes"]
            linear = slopes[0] * sums.chosen + slopes[1] * sums.rejected
            total = ((linear + slopes[2] * sums.chosen_nll) * real).sum()
            losses = batch["mean_loss"].expand_as(real)
        else:
            losses = pair_losses(sums, self.objective, batch["mean_chosen_tokens"])  # type: ignore[arg-type]
            total = (losses * real).sum()
        pairs = real.sum()
        each = {"loss": losses.detach(), **pair_metrics(sums, self.objective.beta)}
        report = {name: _ratio((value * real).sum(), pairs) for name, value in each.items()}
        report |= _token_report(batch, statistics)
        if any(name == "sft" for name, _ in self.objective.terms):
            tokens = (sums.chosen_tokens * real).sum()
            report["nll_loss"] = _ratio((sums.chosen_nll.detach() * real).sum(), tokens)
        # Every context-parallel rank has the pair's loss and adds its tokens' part of the gradient:
        # so one of them counts the pair.
        count = pairs.int() * (mpu.get_context_parallel_rank() == 0)
        return total, count, report

    def _measure(
        self, iterator: Iterator[Batch], model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """A forward step of a pass without gradients that returns PairSums."""
        batch = take_batch(iterator)
        statistics = TokenStatistics()

        def sums(nll: Tensor, non_loss_data: bool = True) -> PairSums:
            return pair_sums(batch, nll, statistics, self.objective)

        return run_model(model, batch, statistics), sums

    def _complete(self, parts: list[list[Batch]], forward: Forward) -> None:
        """Put into the micro-batches of a global batch what a pair's loss needs of other pairs and
        of the reference; `parts` holds the same micro-batches once a model part."""
        for name, values in self._numbers(parts[-1], forward).items():
            for batches in parts:
                for batch, value in zip(batches, values, strict=True):
                    batch[name] = value

    def _numbers(self, batches: list[Batch], forward: Forward) -> dict[str, list[Tensor]]:
        found = {"mean_chosen_tokens": [_mean_chosen_tokens(batches)] * len(batches)}
        if self.reference is not None and not all("ref_logps" in batch for batch in batches):
            ratios = self.reference.measure(forward)
            if ratios:
                found["ref_logps"] = ratios
                for batch, value in zip(batches, ratios, strict=True):
                    batch["ref_logps"] = value
        if self.objective.needs_whole_batch:
            measured = forward(self._measure)
            if measured:
                found |= _slopes(measured, self.objective)
        return found


def pair_sums(
    batch: Batch, nll: Tensor, statistics: TokenStatistics, objective: Objective
) -> PairSums:
    """What losses know of the pairs of a micro-batch, from `nll` [b, s] of its labels."""
    logps = -nll if "loss_scale" not in batch else -nll * batch["loss_scale"]
    values = [logps, nll, torch.ones_like(nll)]
    if objective.weighted:
        values.append(statistics.log_collision)
    answers = sample_sums(values, batch)
    reference = batch.get("ref_logps")
    if reference is None:
        reference = torch.zeros_like(answers[0])
    weights = None
    if objective.weighted:
        each = answer_weight(-answers[1], answers[3], answers[2])
        weights = each[::2] * each[1::2]
    return PairSums(
        *(answers[0, ::2], answers[0, 1::2], reference[::2], reference[1::2]),
        *(answers[2, ::2].detach(), answers[2, 1::2].detach(), answers[1, ::2], weights),
    )


def _ratio(value: Tensor, count: Tensor) -> Tensor:
    """A metric's two sums; without a pair or token it is 0."""
    count = count.float()
    return torch.stack([value.float(), count + torch.finfo(count.dtype).tiny])


def _token_report(batch: Batch, statistics: TokenStatistics) -> dict[str, Tensor]:
    """Means over the answers' tokens, of this rank's chunks of them."""
    answers = batch["labels"] != IGNORE
    chosen = answers & (batch["samples"] % 2 == 1)
    rejected = answers & ~chosen
    means = {
        "logits/chosen": (statistics.mean_logit, chosen),
        "logits/rejected": (statistics.mean_logit, rejected),
        "entropy": (statistics.entropy, answers),
        "mean_token_accuracy": (statistics.is_likeliest, chosen),
    }
    return {name: _ratio((value * of).sum(), of.sum()) for name, (value, of) in means.items()}


def _mean_chosen_tokens(batches: list[Batch]) -> Tensor:
    """The chosen answers' tokens of the global batch, divided by its pairs."""
    pairs = tokens = 0
    for batch in batches:
        trained = batch["labels"] != IGNORE
        chosen = batch["samples"][trained & (batch["samples"] % 2 == 1)]
        tokens += len(chosen)
        pairs += len(chosen.unique())
    sums = torch.tensor([tokens, pairs], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(sums, group=mpu.get_data_parallel_group())
    return (sums[0] / sums[1].clamp(min=1)).float().clamp(min=1)


def _slopes(measured: list[PairSums], objective: Objective) -> dict[str, list[Tensor]]:
    """Of a loss that has no part for each pair: its value, and its derivatives by each pair's sums.

    The sum over pairs of derivative x sum has the gradient of the loss times the pairs, in whatever
    micro-batches it is added up: so it takes the place of the pairs' losses.
    """
    here = PairSums(*(None if each[0] is None else torch.cat(each) for each in zip(*measured)))  # type: ignore[arg-type]
    group = mpu.get_data_parallel_group()
    gathered: list[Any] = [None] * group.size()
    rows = torch.stack([each for each in here if each is not None])
    torch.distributed.all_gather_object(gathered, rows.cpu(), group=group)
    whole = torch.cat(gathered, dim=1).to(rows.device)
    real = (whole[4] > 0) & (whole[5] > 0)
    sums = PairSums(*whole[:, real])
    derivatives = whole.new_zeros(3, whole.shape[1])
    derivatives[:, real] = torch.stack(gradients(sums, objective)) * real.sum()
    start = sum(each.shape[1] for each in gathered[: group.rank()])
    sizes = [len(each.chosen) for each in measured]
    mine = derivatives[:, start : start + sum(sizes)].split(sizes, dim=1)
    value = pair_losses(sums, objective).mean()
    return {"slopes": list(mine), "mean_loss": [value] * len(measured)}
