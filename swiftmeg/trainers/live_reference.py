"""A reference model that runs beside the trained one in every step, over a whole global batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.global_batch import Forward
from swiftmeg.observer import Observer
from swiftmeg.trainers.method import Hook, Run
from swiftmeg.trainers.sample_sums import answers_logps


class LiveReference(Observer):
    """Gives the log-probabilities of answers under a frozen model."""

    def hooks(self) -> list[Hook]:
        """What it does to the bare trained model."""
        return []

    def measure(self, forward: Forward) -> list[Tensor]:
        """Those [n] of the samples of each micro-batch, on the last pipeline stage."""
        raise NotImplementedError


class Start(LiveReference):
    """The trained model as adapters found it: switched off, or those that training starts from.

    What else is trained beside them (--modules_to_save, biases) is put back for the pass.
    """

    def __init__(self, run: Run, *, in_steps: bool = True) -> None:
        """`in_steps` is false where it only runs before the first step."""
        args = run.args
        if in_steps and args.adapter_load and args.finetune:
            raise UserError(
                f"--adapter_load {args.adapter_load} with --finetune true and "
                "--precompute_ref_log_probs false: drop the latter"
            )
        self.overlap = in_steps and args.overlap_param_gather
        self.keeps_adapters = run.adapters is not None
        self.models: list[Any] = []
        self.kept: list[tuple[torch.nn.Parameter, Tensor]] = []

    def hooks(self) -> list[Hook]:
        return [self._keep]

    def _keep(self, models: list[Any]) -> list[Any]:
        """Copy what is trained beside adapters, before a checkpoint is loaded."""
        from swiftmeg.tuners.adapters import attached

        factors = [each.weight for a in attached(models) for each in (a.adapter.A, a.adapter.B)]
        switched_off = set() if self.keeps_adapters else set(factors)
        for model in models:
            for parameter in model.parameters():
                if parameter.requires_grad and parameter not in switched_off:
                    self.kept.append((parameter, parameter.detach().clone()))
        if self.kept and self.overlap:
            raise UserError(
                "--overlap_param_gather true fetches weights while the reference runs: drop it, or "
                "--precompute_ref_log_probs false"
            )
        return models

    def built(self, models: list[Any], optimizer: Any) -> None:
        self.models = models

    def measure(self, forward: Forward) -> list[Tensor]:
        off = without_training(self.models) if self.keeps_adapters else adapters_off(self.models)
        with off, self._put_back():
            return forward(answers_logps)

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        now = [parameter.detach().clone() for parameter, _ in self.kept]
        with torch.no_grad():
            for parameter, before in self.kept:
                parameter.copy_(before)
            try:
                yield
            finally:
                for (parameter, _), value in zip(self.kept, now, strict=True):
                    parameter.copy_(value)


@contextmanager
def without_training(models: list[Any]) -> Iterator[None]:
    """Let `models` compute as in evaluation: no dropout, no losses of routers."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


@contextmanager
def adapters_off(models: list[Any]) -> Iterator[None]:
    """Let `models` compute, as in evaluation, what they would without adapters."""
    from swiftmeg.tuners.adapters import attached

    adapters: list[Any] = [each.adapter for each in attached(models)]
    for adapter in adapters:
        adapter._disable_adapters = True
    try:
        with without_training(models):
            yield
    finally:
        for adapter in adapters:
            adapter._disable_adapters = False
