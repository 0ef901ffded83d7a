"""A run's output folder."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swiftmeg import distributed, platform
from swiftmeg.args.resolve import write_args_file
from swiftmeg.trainers.log import TokenCounter
from swiftmeg.trainers.method import Run


def next_version(root: Path, add_version: bool) -> Path:
    """The run's output folder, `root/vN-time` with the next free N; the same on every rank."""
    if not add_version:
        return root
    found = [re.match(r"v(\d+)", path.name) for path in root.glob("v*")]
    number = max((int(match[1]) for match in found if match), default=-1) + 1
    name = [f"v{number}-{time.strftime('%Y%m%d-%H%M%S')}"]
    import torch

    torch.distributed.broadcast_object_list(name, src=0, device=platform.device())
    return root / name[0]


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
