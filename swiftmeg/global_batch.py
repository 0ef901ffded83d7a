"""Seeing a global batch before the model does: the patch that lets a training method do so."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from swiftmeg.upstream import unpatched

Forward = Callable[..., list[Any]]
"""forward(step, models=None): run the model parts, or others, on a global batch's micro-batches,
without gradients. `step` is a forward step whose second result is called with `non_loss_data=True`.
Returns what that returned for each micro-batch, on the last pipeline stage; elsewhere []."""

WholeBatch = Callable[[list[list[Any]], Forward], None]
"""Called with this rank's micro-batches of a global batch, a list for each model part here (all the
same, but objects of their own), and what runs the model on them."""


def on_global_batch(prepare: WholeBatch | None) -> None:
    """Let `prepare` see and change the micro-batches of every global batch before they are used.

    In training and in evaluation; None takes an earlier one away. Can go when the loop has a
    callback between drawing the data and running its schedule.
    """
    from megatron.training import training

    original = unpatched(training, "get_forward_backward_func")
    training.get_forward_backward_func = original
    if prepare is None:
        return

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return partial(_prepared, original(*args, **kwargs), prepare)

    get_forward_backward_func._original = original  # type: ignore[attr-defined]
    training.get_forward_backward_func = get_forward_backward_func


def _prepared(
    schedule: Any,
    prepare: WholeBatch,
    *,
    data_iterator: Any,
    model: Any,
    num_microbatches: int,
    forward_step_func: Any,
    **options: Any,
) -> Any:
    """Run `schedule` on micro-batches that `prepare` has seen."""
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    parts = [[next(each) for _ in range(num_microbatches)] for each in iterators]

    def run(step: Any, model: Any, **changes: Any) -> Any:
        again = [iter(batches) for batches in parts]
        return schedule(
            forward_step_func=step,
            data_iterator=again if isinstance(data_iterator, list) else again[0],
            model=model,
            num_microbatches=num_microbatches,
            **options | changes,
        )

    def forward(step: Any, other: Any = None) -> list[Any]:
        with torch.no_grad():
            found = run(step, other or model, forward_only=True, collect_non_loss_data=True)
        return list(found)

    prepare(parts, forward)
    return run(forward_step_func, model)
