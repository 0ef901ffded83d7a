"""Watching Megatron's loop: what an observer may see, and the patches that let it see."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swiftmeg.upstream import unpatched


@dataclass(frozen=True)
class Step:
    """One training step, as Megatron logs it."""

    iteration: int
    losses: dict[str, Tensor]
    """Means over the global batch; on ranks of the last pipeline stage."""
    learning_rate: float | None
    loss_scale: float
    skipped: bool
    """True where a gradient was not finite, so that the weights are as before."""
    grad_norm: float | None
    params_norm: float | None
    is_first: bool
    """True on the first step of a run, which Megatron logs whatever --log_interval is."""


class Observer:
    """Watches a run; every method does nothing unless a subclass says otherwise.

    Called on every rank, observers in their order, except where a method says otherwise.
    """

    def built(self, models: list[Any], optimizer: Any) -> None:
        """The model parts of this rank and their optimizer are there, and a checkpoint loaded."""

    def after_step(self, step: Step) -> None:
        """A training step has been made."""

    def evaluated(self, iteration: int, losses: dict[str, float]) -> None:
        """The validation set has been evaluated; `losses` on ranks of the last pipeline stage."""

    def before_save(self, iteration: int) -> None:
        """A checkpoint will be written."""

    def saved(self, iteration: int, models: list[Any]) -> None:
        """A checkpoint has been written, or with --async_save begun."""

    def completed(self, iteration: int) -> None:
        """Nothing is left to write of a checkpoint; on the first rank alone.

        With --async_save that is some steps after `saved`.
        """

    def line(self, text: str) -> str:
        """A line that Megatron prints, changed or not; on the last rank alone."""
        return text

    def ended(self) -> None:
        """The loop has ended, on every rank."""


def observe(observers: list[Observer]) -> None:
    """Let `observers`, and those of no earlier call, watch Megatron's loop.

    The loop has no callbacks, training_log() none for metrics, evaluate_and_print_results() returns
    nothing. Can go when pretrain() takes callbacks that see all that `Observer` names.
    """
    _observe_building(observers)
    _observe_steps(observers)
    _observe_evaluations(observers)
    _observe_saves(observers)


def _observe_building(observers: list[Observer]) -> None:
    from megatron.training import training

    original = unpatched(training, "setup_model_and_optimizer")

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        models, optimizer, scheduler = original(*args, **kwargs)
        for each in observers:
            each.built(models, optimizer)
        return models, optimizer, scheduler

    setup_model_and_optimizer._original = original  # type: ignore[attr-defined]
    training.setup_model_and_optimizer = setup_model_and_optimizer


def _observe_steps(observers: list[Observer]) -> None:
    from megatron.training import get_args, training

    original = unpatched(training, "training_log")

    def training_log(
        losses: dict[str, Tensor],
        totals: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory: bool,
        skipped: int,
        grad_norm: float | None,
        params_norm: float | None,
        *args: Any,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Any:
        # After a line for the first step the sums run on, so that the next line is the mean of a
        # whole interval. Where the first step ends one, the next line would hold two: a continued
        # run would not print what an uninterrupted one does.
        first = is_first_iteration and iteration % get_args().log_interval != 0
        step = Step(
            *(iteration, losses, learning_rate, loss_scale, bool(skipped)),
            *(grad_norm, params_norm, first),
        )
        for each in observers:
            each.after_step(step)
        return original(
            *(losses, totals, learning_rate, iteration, loss_scale, report_memory, skipped),
            *(grad_norm, params_norm, *args),
            is_first_iteration=first,
            **kwargs,
        )

    def print_rank_last(text: str) -> None:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            for each in observers:
                text = each.line(text)
            print(text, flush=True)

    training_log._original = original  # type: ignore[attr-defined]
    training.training_log = training_log
    training.print_rank_last = print_rank_last


def _observe_evaluations(observers: list[Observer]) -> None:
    from megatron.training import training

    evaluate = unpatched(training, "evaluate")
    report = unpatched(training, "evaluate_and_print_results")
    found: dict[str, Tensor] = {}

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        found.clear()
        found.update(result[0] or {})
        return result

    def reporting(
        prefix: str,
        forward_step: Any,
        iterator: Any,
        model: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = report(prefix, forward_step, iterator, model, iteration, *args, **kwargs)
        for each in observers:
            each.evaluated(iteration, {key: float(value) for key, value in found.items()})
        return result

    recording._original = evaluate  # type: ignore[attr-defined]
    reporting._original = report  # type: ignore[attr-defined]
    training.evaluate = recording
    training.evaluate_and_print_results = reporting


def _observe_saves(observers: list[Observer]) -> None:
    from megatron.training import checkpointing, training

    original = unpatched(training, "save_checkpoint")

    def completed(iteration: int) -> None:
        for each in observers:
            each.completed(iteration)

    def save_checkpoint(iteration: int, model: Any, *args: Any, **kwargs: Any) -> Any:
        for each in observers:
            each.before_save(iteration)
        result = original(iteration, model, *args, **kwargs)
        for each in observers:
            each.saved(iteration, model)
        return result

    checkpointing.maybe_msc.on_complete = completed
    save_checkpoint._original = original  # type: ignore[attr-defined]
    training.save_checkpoint = save_checkpoint
