"""A dry run: every check that training makes, then the plan instead of the training."""

import copy
import os
from dataclasses import dataclass
from typing import Any

from swiftmeg import platform
from swiftmeg.args.effects import notes
from swiftmeg.args.resolve import describe
from swiftmeg.models.hf import HFModel
from swiftmeg.trainers.method import Method
from swiftmeg.trainers.start import prepare
from swiftmeg.trainers.training_data import TrainingData


@dataclass(frozen=True)
class Sizes:
    """What the data say of a run."""

    longest: int
    """Tokens of the longest sample, or of a pack."""
    train_iters: int | None
    eval_iters: int = 0
    rows: int | None = None
    """Items of the training set: samples, pairs or packs."""
    sides: int = 1
    """Samples of an item: 2 of a pair."""


def dry_run(args: Any, sources: dict[str, str], model: HFModel, method: Method) -> None:
    """Print the plan of a training command; nothing is written and no other process is needed."""
    start = prepare(args, sources, model, method)
    sizes = _sizes(args, model, start.data, method.sides)
    print(describe(args, sources), flush=True)
    for note in notes(args, sources, model, _backend(args)):
        print(f"note: {note}", flush=True)
    platform.prepare()
    from swiftmeg import upstream
    from swiftmeg.planning.report import report
    from swiftmeg.planning.stages import build_stages
    from swiftmeg.trainers.hooks import tuner_hooks

    upstream.apply()
    megatron = make_namespace(args, model, sizes, method.megatron_flags(args))
    stages = build_stages(megatron, model.hf_config, tuner_hooks(args))
    megatron.layer_backend = _backend(args)
    megatron.frozen_copies = method.frozen_copies(args)
    megatron.padded_batches = not (args.padding_free or args.packing)
    for line in report(args, megatron, model, stages, sizes):
        print(line)


def _sizes(args: Any, model: HFModel, data: TrainingData | None, sides: int) -> Sizes:
    """From the data; without --dataset from --max_length, else from what the model can take."""
    if data is not None:
        rows = None if args.streaming else len(data.train)
        return Sizes(data.longest, data.train_iters, data.eval_iters, rows, sides)
    longest = args.seq_length or args.max_length or model.config["max_position_embeddings"]
    return Sizes(longest, args.train_iters, sides=sides)


def make_namespace(
    args: Any, model: HFModel, sizes: Sizes, changes: dict[str, Any] | None = None
) -> Any:
    """Megatron's namespace of the run; its layers are native ones, which need no GPU."""
    from swiftmeg.trainers.training_namespace import training_namespace

    os.environ.update(RANK="0", LOCAL_RANK="0")
    planned = copy.copy(args)
    planned.transformer_impl = "native"
    return training_namespace(planned, model, sizes, changes)


def _backend(args: Any) -> str:
    """The layers of the training: a plan is for GPUs with TransformerEngine unless it is told."""
    return "native" if args.transformer_impl in ("native", "local") else "transformer_engine"
