"""A run's output folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from swiftmeg import distributed
from swiftmeg.args.resolve import write_args_file
from swiftmeg.claim import claim
from swiftmeg.errors import UserError
from swiftmeg.trainers.log import TokenCounter
from swiftmeg.trainers.method import Run


def claim_folder(root: Path, add_version: bool) -> Path:
    """The run's output folder, `root` or a new `root/vN-time`, which no other run writes to.

    The same on every rank; collective. UserError, on every rank, if another run has it.
    """
    claimed: Path | UserError | None = None
    if distributed.on_rank_zero():
        try:
            claimed = claim(root, add_version)
        except UserError as error:
            claimed = error
    claimed = distributed.gathered(claimed)[0]
    if isinstance(claimed, UserError):
        raise claimed
    assert claimed is not None
    return claimed


def open_with_data(run: Run, megatron: Any, counter: TokenCounter) -> Callable[..., Any]:
    """The provider of the data, which also opens the output folder.

    Megatron calls it when the model and any checkpoint are loaded: input that is found to be wrong
    until then leaves nothing behind, and the args.json of a continued run as it was.
    """
    provide = run.data.provider(megatron)

    def begin(sizes: Any, vp_stage: int | None = None) -> Any:
        train, validation, test = provide(sizes, vp_stage)
        if not vp_stage:  # each model part gets the same batches
            train = counter.counted(train)
            _open_folder(run, megatron)
        return train, validation, test

    begin.is_distributed = True  # type: ignore[attr-defined]  # every rank reads its own
    return begin


def _open_folder(run: Run, megatron: Any) -> None:
    from megatron.training import global_vars

    if distributed.on_rank_zero():
        write_args_file(run.folder, run.args, run.sources)
    megatron.tensorboard_dir = run.args.tensorboard_dir or str(run.folder / "runs")
    global_vars._set_tensorboard_writer(megatron)
    writer = global_vars.get_tensorboard_writer()
    if writer and run.args.no_log_learning_rate_to_tensorboard:
        leave_out(writer, "learning-rate")


def leave_out(writer: Any, prefix: str) -> None:
    """Keep curves whose names start with `prefix` out of TensorBoard."""
    write = writer.add_scalar

    def add_scalar(tag: str, *args: Any, **kwargs: Any) -> None:
        if not tag.startswith(prefix):
            write(tag, *args, **kwargs)

    writer.add_scalar = add_scalar
