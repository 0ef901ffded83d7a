"""The end of a run whose loss, gradient or weights are no finite numbers any more."""

import math
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from swiftmeg import checkpoint, distributed
from swiftmeg.errors import Diverged, UserError
from swiftmeg.observer import Observer, Step
from swiftmeg.trainers.method import Run

_REMEDY = (
    "lower --lr, raise --lr_warmup_fraction or --lr_warmup_iters, lower --clip_grad, or look at "
    "the data by `megatron data --inspect true`"
)


class Divergence(Observer):
    """Refuses weights that are not finite, and ends a run that goes there; Diverged, exit code 3.

    Nothing is saved of what came after, so the last good checkpoint stays the latest. A step that
    fp16's loss scaling skips is no divergence while the scale can still be lowered.
    """

    def __init__(self, run: Run, megatron: Any) -> None:
        self._run = run
        self._lowest_scale = megatron.loss_scale or megatron.min_loss_scale or 1.0
        self._models: list[Any] = []

    def built(self, models: list[Any], optimizer: Any) -> None:
        self._models = models
        if name := self._not_finite():
            args = self._run.args
            source = f"--load {args.load}" if args.load else f"--model {self._run.model.folder}"
            raise UserError(
                f"{source}: weight {name} holds values that are not finite: training cannot mend "
                "them; start from other weights"
            )

    def after_step(self, step: Step) -> None:
        if self._run.args.no_check_for_nan_in_loss_and_grad:
            return
        if step.skipped:
            if step.loss_scale <= self._lowest_scale:
                self._end(step.iteration, f"the gradient overflows at loss scale {step.loss_scale}")
            return
        found = {name: float(value) for name, value in step.losses.items()}
        if step.grad_norm is not None:
            found["gradient norm"] = float(step.grad_norm)
        for name, value in found.items():
            if not math.isfinite(value):
                self._end(step.iteration, f"{name} is {value}")

    def before_save(self, iteration: int) -> None:
        if name := self._not_finite():
            self._end(iteration, f"weight {name} holds values that are not finite")

    def _not_finite(self) -> str | None:
        """The first weight of any rank that is not finite; collective."""
        named = [
            (name, parameter.detach())
            for model in unwrap_model(self._models)
            for name, parameter in model.named_parameters()
        ]
        found = None
        if named:
            largest = torch.stack(
                [torch.linalg.vector_norm(each, math.inf, dtype=torch.float32) for _, each in named]
            )
            bad = (~largest.isfinite()).nonzero().flatten().tolist()
            found = named[bad[0]][0] if bad else None
        return next((name for name in distributed.gathered(found) if name), None)

    def _end(self, iteration: int, reason: str) -> None:
        folder = self._run.folder
        try:
            latest = f"{folder / checkpoint.read_iteration(folder)} stays the latest checkpoint"
        except UserError:
            latest = "no checkpoint was saved"
        raise Diverged(
            f"iteration {iteration}: {reason}: the run has diverged and ends; {latest}: {_REMEDY}"
        )
