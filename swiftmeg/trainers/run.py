"""Training: resolved arguments in, Megatron's loop out. The only caller of `pretrain`."""

from functools import partial
from pathlib import Path
from typing import Any

from swiftmeg import distributed, platform
from swiftmeg.args.effects import notes
from swiftmeg.args.resolve import describe
from swiftmeg.claim import release
from swiftmeg.global_batch import on_global_batch
from swiftmeg.models.hf import HFModel
from swiftmeg.models.vocabulary import untrained_rows
from swiftmeg.observer import Observer, observe
from swiftmeg.trainers.checkpoints import (
    CheckpointFolder,
    keep_random_state,
    nothing_left,
    settle_start,
)
from swiftmeg.trainers.method import Method, Run
from swiftmeg.trainers.start import prepare, save_root


def train(
    args: Any,
    sources: dict[str, str],
    model: HFModel,
    method: Method,
    observers: list[Observer] | None = None,
) -> None:
    """Train as `args` say, watched by `observers` in addition to the run's own.

    Everything that can be wrong with the input is found, and the data are tokenised, before
    Megatron is imported and before any process group exists.
    """
    start = prepare(args, sources, model, method)
    assert start.data is not None
    platform.prepare()
    distributed.initialize(args.distributed_timeout_minutes)
    settle_start(args, start.note)
    for warning in (nothing_left(args, start.data.train_iters), untrained_rows(args)):
        if warning and distributed.on_rank_zero():
            print(f"warning: {warning}", flush=True)
    from swiftmeg.models.layers import choose_backend  # behind Megatron's import
    from swiftmeg.trainers.output import claim_folder

    folder = claim_folder(save_root(args, model), args.add_version)
    args.save = str(folder)
    if distributed.on_rank_zero():
        print(describe(args, sources), flush=True)
        for note in notes(args, sources, model, choose_backend(args.transformer_impl)):
            print(f"note: {note}", flush=True)
    _run_loop(Run(args, sources, model, method, folder, start.data, start.adapters), observers)


def _run_loop(run: Run, observers: list[Observer] | None) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from swiftmeg import upstream
    from swiftmeg.models.build import model_config
    from swiftmeg.trainers.groups import parameter_groups
    from swiftmeg.trainers.hooks import model_hooks
    from swiftmeg.trainers.log import TokenCounter
    from swiftmeg.trainers.output import open_with_data
    from swiftmeg.trainers.training_namespace import training_namespace

    upstream.apply()
    args = run.args
    flags = run.method.megatron_flags(args)
    megatron = training_namespace(args, run.model, run.data, flags)
    _compare_with_saved(run, megatron)
    training = run.method.training(run, megatron)
    hooks = [*model_hooks(run, megatron), *training.hooks()]
    container = pretrain_cfg_container_from_args(
        megatron, model_config(megatron, run.model.hf_config, pre_wrap_hooks=hooks)
    )
    container.model.transformer.variable_seq_lengths = True
    container.model.finalize()
    upstream.group_parameters(partial(parameter_groups, lorap_lr_ratio=args.lorap_lr_ratio))
    if args.async_save:
        upstream.write_in_background()
    counter = TokenCounter()
    on_global_batch(training.whole_batch())
    watching = [*_observers(run, megatron, counter), *training.observers(), *(observers or [])]
    observe(watching)
    pretrain(
        container,
        open_with_data(run, megatron, counter),
        ModelType.encoder_or_decoder,
        training.forward_step,
    )
    distributed.barrier()
    for each in watching:
        each.ended()
    distributed.barrier()
    release(run.folder)
    distributed.shut_down()


def _compare_with_saved(run: Run, megatron: Any) -> None:
    """Check that the checkpoints to start from are of this model; take what they say of the run."""
    from swiftmeg.export.model import check_same_model, saved_arguments
    from swiftmeg.trainers.resumed import tell_changes

    args = run.args
    for flag in dict.fromkeys(("load", args.continued)):
        if (named := getattr(args, flag)) is None:
            continue
        saved = saved_arguments(Path(named), args.ckpt_step if flag == args.continued else None)
        check_same_model(megatron, saved, run.model, f"--{flag}", Path(named))
        if flag == args.continued:
            keep_random_state(megatron, saved)
            tell_changes(args, megatron, saved)
            run.data.resume(saved)


def _observers(run: Run, megatron: Any, counter: Any) -> list[Observer]:
    from swiftmeg.trainers.curves import Curves
    from swiftmeg.trainers.divergence import Divergence
    from swiftmeg.trainers.hf_checkpoints import HFCheckpoints
    from swiftmeg.trainers.log import RunLog
    from swiftmeg.trainers.training_data import DataPosition

    return [
        DataPosition(run.data, megatron),
        Divergence(run, megatron),
        CheckpointFolder(run.folder, run.args.save_total_limit),
        RunLog(run.folder, megatron, counter),
        *([HFCheckpoints(run, megatron)] if run.args.save_safetensors else []),
        Curves(run.folder, megatron),
    ]
