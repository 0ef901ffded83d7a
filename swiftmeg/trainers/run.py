"""Training: resolved arguments in, Megatron's loop out. The only caller of `pretrain`."""

import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swiftmeg import distributed, platform
from swiftmeg.args.check import check_training, check_writable, checkpoint_defaults
from swiftmeg.args.resolve import describe, write_args_file
from swiftmeg.export.hf_files import HFWeights, check_names
from swiftmeg.models.hf import HFModel
from swiftmeg.models.vocabulary import untrained_rows
from swiftmeg.trainers.checkpoints import (
    CheckpointFolder,
    keep_random_state,
    nothing_left,
    settle_start,
)
from swiftmeg.trainers.data import TrainingData, prepare_data
from swiftmeg.tuners.peft_format import HFAdapters
from swiftmeg.tuners.start import start_from


@dataclass
class Run:
    """Everything a training method needs to know about its run."""

    args: Any
    sources: dict[str, str]
    model: HFModel
    folder: Path
    data: TrainingData
    adapters: HFAdapters | None
    """What the adapters start from, if not from scratch or a checkpoint."""


def train(args: Any, sources: dict[str, str], model: HFModel) -> None:
    """Train as `args` say.

    Everything that can be wrong with the input is found, and the data are tokenised, before
    Megatron is imported and before any process group exists.
    """
    adapters = start_from(args, sources, model)
    note = checkpoint_defaults(args, sources)
    check_training(args, model)
    check_writable("--save", save_root(args, model))
    if args.load is None:
        check_names(model.family, model.config, HFWeights(model.folder))
    data = prepare_data(args, model)
    platform.prepare()
    distributed.initialize(args.distributed_timeout_minutes)
    settle_start(args, note)
    if (end := nothing_left(args, data.train_iters)) and distributed.on_rank_zero():
        print(f"warning: {end}", flush=True)
    if (warning := untrained_rows(args)) and distributed.on_rank_zero():
        print(f"warning: {warning}", flush=True)
    folder = next_version(save_root(args, model), args.add_version)
    args.save = str(folder)
    if distributed.on_rank_zero():
        print(describe(args, sources), flush=True)
    _run_loop(Run(args, sources, model, folder, data, adapters))


def save_root(args: Any, model: HFModel) -> Path:
    """The folder that --save or its default names."""
    return Path(args.save or Path("megatron_output") / model.folder.name).expanduser().resolve()


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


def _run_loop(run: Run) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from swiftmeg import upstream
    from swiftmeg.export.model import check_same_model, saved_arguments
    from swiftmeg.models.build import model_config
    from swiftmeg.trainers.groups import parameter_groups
    from swiftmeg.trainers.hooks import model_hooks
    from swiftmeg.trainers.log import RunLog, TokenCounter, draw_curves
    from swiftmeg.trainers.sft import make_forward_step
    from swiftmeg.trainers.training_namespace import training_namespace

    upstream.apply()
    args, model = run.args, run.model
    megatron = training_namespace(args, model, run.data)
    for flag in dict.fromkeys(("load", args.continued)):
        if (named := getattr(args, flag)) is not None:
            step = args.ckpt_step if flag == args.continued else None
            saved = saved_arguments(Path(named), step)
            check_same_model(megatron, saved, model, f"--{flag}", Path(named))
            if flag == args.continued:
                keep_random_state(megatron, saved)
                run.data.resume(saved)
    container = pretrain_cfg_container_from_args(
        megatron, model_config(megatron, model.hf_config, pre_wrap_hooks=model_hooks(run, megatron))
    )
    container.model.transformer.variable_seq_lengths = True
    container.model.finalize()
    upstream.group_parameters(partial(parameter_groups, lorap_lr_ratio=args.lorap_lr_ratio))
    counter = TokenCounter()
    log = RunLog(run.folder, megatron, counter)

    def after_step(*step: Any, **more: Any) -> None:
        run.data.after_step(megatron, iteration=step[3])
        log.observe(*step, **more)

    upstream.on_training_log(after_step, log.print_line)
    upstream.on_evaluation(log.observe_evaluation)
    folder = CheckpointFolder(run.folder, args.save_total_limit)
    write_hf = _hf_writer(run, folder, megatron) if args.save_safetensors else None
    if args.async_save:
        upstream.write_in_background()

    def before_save(iteration: int) -> None:
        folder.before(iteration)
        run.data.before_save(megatron)

    upstream.on_save(before_save, folder.complete, write_hf)
    pretrain(
        container,
        _begin_with(run, megatron),
        ModelType.encoder_or_decoder,
        make_forward_step(counter),
    )
    distributed.barrier()
    if log.is_writer:
        _close_tensorboard()
        draw_curves(Path(megatron.tensorboard_dir), run.folder / "images")
        print(f"checkpoints, logs and curves are in {run.folder}", flush=True)
    distributed.barrier()
    distributed.shut_down()


def _begin_with(run: Run, megatron: Any) -> Callable[..., Any]:
    """The provider of the data, which also opens the output folder.

    Megatron calls it when the model and any checkpoint are loaded: input that is found to be wrong
    until then leaves nothing behind, and the args.json of a continued run as it was.
    """
    provide = run.data.provider(megatron)

    def begin(sizes: Any, vp_stage: int | None = None) -> Any:
        iterators = provide(sizes, vp_stage)
        if not vp_stage:
            _open_folder(run, megatron)
        return iterators

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
        _leave_out(writer, "learning-rate")


def _leave_out(writer: Any, prefix: str) -> None:
    """Keep curves whose names start with `prefix` out of TensorBoard."""
    write = writer.add_scalar

    def add_scalar(tag: str, *args: Any, **kwargs: Any) -> None:
        if not tag.startswith(prefix):
            write(tag, *args, **kwargs)

    writer.add_scalar = add_scalar


def _close_tensorboard() -> None:
    from megatron.training.global_vars import get_tensorboard_writer

    if writer := get_tensorboard_writer():
        writer.flush()
        writer.close()


def _hf_writer(run: Run, folder: CheckpointFolder, megatron: Any) -> Callable[[int, Any], None]:
    """Write `iter_N-hf` beside each checkpoint: the whole model, or its adapters."""
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.models.build import dims_of
    from swiftmeg.tuners.peft_folder import save_peft

    def write(iteration: int, models: Any) -> None:
        if run.args.is_lora:
            save_peft(models, folder.hf_folder(iteration), run.args, run.model, dims_of(megatron))
            return
        save_hf(
            models,
            folder.hf_folder(iteration),
            run.model.folder,
            run.model.family,
            run.model.config,
            dims_of(megatron),
            dtype=megatron.params_dtype,
            overrides=run.model.overrides,
        )
        gc.collect()

    return write
