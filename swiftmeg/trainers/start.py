"""What training and its dry run do first: find all that can be wrong with the input."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftmeg.args.check import check_training, check_writable, checkpoint_defaults
from swiftmeg.export.hf_files import HFWeights, check_names
from swiftmeg.models.hf import HFModel
from swiftmeg.trainers.method import Method
from swiftmeg.trainers.training_data import TrainingData
from swiftmeg.tuners.peft_format import HFAdapters
from swiftmeg.tuners.start import start_from


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    adapters: HFAdapters | None
    """What the adapters start from, if not from scratch or a checkpoint."""
    note: str | None
    """What is to be said of the checkpoint, where it is not the latest one."""
    data: TrainingData | None
    """None in a dry run without --dataset."""


def prepare(args: Any, sources: dict[str, str], model: HFModel, method: Method) -> Start:
    """Complete and check `args`, compare the weights' names with the model, tokenise the data.

    Needs no Megatron and no process group, so that bad input ends in seconds. A dry run may do
    without the weights (a folder with config.json alone) and without data. Raises UserError.
    """
    adapters = start_from(args, sources, model)
    note = checkpoint_defaults(args, sources)
    check_training(args, model)
    check_writable("--save", save_root(args, model))
    if args.load is None and not (args.dry_run and not has_weights(model)):
        check_names(model.family, model.config, HFWeights(model.folder, model.config))
    without = args.dry_run and not args.dataset
    return Start(adapters, note, None if without else method.prepare_data(args, model))


def save_root(args: Any, model: HFModel) -> Path:
    """The folder that --save or its default names."""
    return Path(args.save or Path("megatron_output") / model.folder.name).expanduser().resolve()


def has_weights(model: HFModel) -> bool:
    """True if the model's folder holds safetensors."""
    return any(model.folder.glob("*.safetensors*"))
