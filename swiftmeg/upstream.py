"""Every patch of Megatron, each with its reason and the condition under which it can go."""

import queue
from collections.abc import Callable
from typing import Any

from swiftmeg import platform


def apply() -> None:
    """Install the patches that every command needs; calling it again changes nothing."""
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import arguments, initialize, training

    # The wheel ships helpers_cpp compiled but no Makefile, and compile_helpers() runs `make` and
    # exits the process when that fails. Can go when upstream skips an existing library.
    dataset_utils.compile_helpers = lambda: None
    # A save starts a manager process per rank for the results of its writers, although these are
    # threads unless the save is asynchronous: seconds lost, and an orphan where a rank is killed.
    # Can go when upstream starts it for asynchronous saves only.
    filesystem_async._results_queue = queue.Queue()
    # Prints about 900 lines. The values that matter are in args.json, with their sources, and all
    # are in the checkpoint. Can go when upstream has a switch for it.
    arguments._print_args = lambda title, args: None
    # Print a block of estimates at each early log line; the lines state the peak. Can go likewise.
    training.report_theoretical_memory = training.report_memory = lambda *args, **kwargs: None
    if not platform.has_cuda():
        # initialize_megatron asserts CUDA unless told otherwise, and pretrain() does not pass the
        # switch on. Can go when pretrain() takes `allow_no_cuda`.
        original = initialize.initialize_megatron

        def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **{"allow_no_cuda": True, **kwargs})

        if training.initialize_megatron is original:
            training.initialize_megatron = initialize_megatron
        # Warms up kernels of torch's compiler, which is off without CUDA, on buffers of
        # seq_length x ffn_hidden_size. Can go when it asks whether there is a compiler.
        training.set_jit_fusion_options = lambda *args, **kwargs: None


def on_training_log(observer: Callable[..., None], print_line: Callable[[str], None]) -> None:
    """Call `observer` with the arguments of every training_log() and send its line to `print_line`.

    The loop has no callback for metrics. Can go when training_log() gets one.
    """
    from megatron.training import training

    original = _original(training, "training_log")

    def training_log(*args: Any, **kwargs: Any) -> Any:
        observer(*args, **kwargs)
        return original(*args, **kwargs)

    training.training_log = training_log
    training.training_log._original = original
    training.print_rank_last = print_line


def on_evaluation(observer: Callable[[int, dict[str, float]], None]) -> None:
    """Call `observer(iteration, losses)` after every evaluation, on every rank.

    evaluate_and_print_results() returns nothing. Can go when it returns its losses.
    """
    from megatron.training import training

    evaluate = _original(training, "evaluate")
    report = _original(training, "evaluate_and_print_results")
    state: dict[str, Any] = {}

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        state["losses"] = result[0]
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
        losses = state.pop("losses", None) or {}
        observer(iteration, {key: float(value) for key, value in losses.items()})
        return result

    recording._original = evaluate  # type: ignore[attr-defined]
    reporting._original = report  # type: ignore[attr-defined]
    training.evaluate = recording
    training.evaluate_and_print_results = reporting


def after_save(observer: Callable[[int, Any], None]) -> None:
    """Call `observer(iteration, model)` after every checkpoint, on every rank.

    Can go when save_checkpoint() gets a callback.
    """
    from megatron.training import training

    original = _original(training, "save_checkpoint")

    def save_checkpoint(iteration: int, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(iteration, model, *args, **kwargs)
        observer(iteration, model)
        return result

    save_checkpoint._original = original  # type: ignore[attr-defined]
    training.save_checkpoint = save_checkpoint


def _original(module: Any, name: str) -> Any:
    """The upstream function behind an earlier patch, so that patches of two runs do not pile up."""
    function = getattr(module, name)
    return getattr(function, "_original", function)
