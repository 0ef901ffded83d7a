"""A second model in the process: the frozen reference of full training."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from swiftmeg.checkpoint import check_checkpoint
from swiftmeg.errors import UserError
from swiftmeg.global_batch import Forward
from swiftmeg.observer import Step
from swiftmeg.trainers.live_reference import LiveReference, Start
from swiftmeg.trainers.method import Hook, Run
from swiftmeg.trainers.reference_model import reference_model
from swiftmeg.trainers.sample_sums import answers_logps


def live_reference(run: Run, megatron: Any) -> LiveReference:
    """The trained model as its adapters found it, or a second one; see ReferenceArguments."""
    args = run.args
    named = args.ref_load or args.ref_model or args.ref_adapters
    return Start(run) if args.is_lora and not named else FrozenModel(run, megatron)


class FrozenModel(LiveReference):
    """A second set of weights in the training's dtype, without gradients, optimizer or buffers."""

    def __init__(self, run: Run, megatron: Any) -> None:
        self.run = run
        self.megatron = megatron
        self.models: list[Any] = []
        self.trained: list[Any] = []

    def built(self, models: list[Any], optimizer: Any) -> None:
        args = self.run.args
        if args.sync_ref_model and self.megatron.iteration:
            raise UserError(
                "--sync_ref_model true: checkpoints do not hold the reference, so such a run "
                "cannot be continued: start anew by --finetune true"
            )
        if args.sync_ref_model and args.overlap_param_gather:
            raise UserError(
                "--sync_ref_model true reads weights while --overlap_param_gather true fetches "
                "them: drop one"
            )
        self.trained = models
        self.models = build_frozen(self.run, self.megatron)

    def after_step(self, step: Step) -> None:
        args = self.run.args
        if args.sync_ref_model and step.iteration % args.ref_model_sync_steps == 0:
            move_towards(self.models, self.trained, args.ref_model_mixup_alpha)

    def measure(self, forward: Forward) -> list[Tensor]:
        return forward(answers_logps, self.models)


@torch.no_grad()
def move_towards(models: list[Any], others: list[Any], share: float) -> None:
    """Make each weight of `models` a mean, to which that of `others` counts `share` (TR-DPO)."""
    for model, other in zip(models, others, strict=True):
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), share)


def build_frozen(run: Run, megatron: Any) -> list[Any]:
    """This rank's parts of the reference model that --ref_load, --ref_model or the start names.

    It has the trained model's architecture; UserError where the weights named have another.
    Collective.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    from swiftmeg.models.build import model_config

    hooks = [_reference_weights(run, megatron)]
    config = model_config(megatron, run.model.hf_config, pre_wrap_hooks=hooks)
    config.transformer.variable_seq_lengths = True
    config.finalize()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models: list[Any] = config.get_builder_cls()(config).build_distributed_models(
        groups, wrap_with_ddp=False
    )
    for part in models:
        part.requires_grad_(False).eval()
    return models


def _reference_weights(run: Run, megatron: Any) -> Hook:
    from swiftmeg.export.hf_reader import load_hf
    from swiftmeg.export.model import check_same_model, load_weights, saved_arguments
    from swiftmeg.models.build import dims_of

    args, model = run.args, run.model
    if args.ref_load:
        folder = check_checkpoint("--ref_load", args.ref_load)
        check_same_model(megatron, saved_arguments(folder), model, "--ref_load", folder)
        return partial(load_weights, folder=folder)
    if args.load and args.finetune and not args.ref_model:
        return partial(load_weights, folder=args.load)
    named = reference_model(args, model) if args.ref_model else model

    def from_hf(models: list[Any]) -> list[Any]:
        load_hf(models, named.folder, named.family, named.config, dims_of(megatron))
        return models

    return from_hf
