"""A reference whose log-probabilities are numbers: measured once, kept beside the tokens.

They are fixed by the reference's weights and the pairs, so no second model has to be there while
training, and every run of the same pairs from the same weights shares them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from swiftmeg import distributed
from swiftmeg.args.adapter_config import RESIDUAL_STARTS
from swiftmeg.cache import cache_root, content_key, get_or_build
from swiftmeg.checkpoint import read_iteration
from swiftmeg.data.encoded.tokens import PairDataset, TokenDataset
from swiftmeg.errors import UserError
from swiftmeg.export.model import saved_arguments
from swiftmeg.global_batch import Forward
from swiftmeg.models.hf import find_folder
from swiftmeg.trainers.frozen_model import FrozenModel
from swiftmeg.trainers.live_reference import LiveReference, Start
from swiftmeg.trainers.method import Hook, Run
from swiftmeg.trainers.reference_pass import Measure, evaluating, reference_logps
from swiftmeg.trainers.sample_sums import answers_logps

_FORMAT = 1  # raise it when the same weights would give other numbers than before

LOGPS = "logps.bin"


class StoredReference(LiveReference):
    """Gives the pairs of a run their `ref_logps` as soon as its model is there.

    The reference is the model that training starts from, unless flags name another. A checkpoint
    keeps which weights that were, so that a continued run finds their numbers, or measures them
    anew where they are still there.
    """

    def __init__(self, run: Run, megatron: Any) -> None:
        args = run.args
        self.run = run
        self.megatron = megatron
        self.named = bool(args.ref_load or args.ref_model or args.ref_adapters)
        self.continued = getattr(args, args.continued) is not None and not args.finetune
        self.live: LiveReference | None = None
        """What is measured where that is not the model as training finds it."""
        if self.named or (self.continued and not args.is_lora):
            self.live = FrozenModel(run, megatron)
        elif self.continued:
            self.live = Start(run, in_steps=False)

    def hooks(self) -> list[Hook]:
        return [] if self.live is None else self.live.hooks()

    def built(self, models: list[Any], optimizer: Any) -> None:
        weights = distributed.from_rank_zero(self._weights() if distributed.on_rank_zero() else "")
        self.megatron.reference_weights = weights  # which checkpoints keep
        for data in (self.run.data.train, self.run.data.validation):
            if data is not None:
                self._give(self.run.method.sequences(data), weights, models)
        self.live = None  # its weights have done their part

    def measure(self, forward: Forward) -> list[Tensor]:
        """Nothing: micro-batches without numbers are those that fill up an evaluation."""
        return []

    def _give(self, sides: TokenDataset, weights: str, models: list[Any]) -> None:
        run = self.run
        described = [_FORMAT, sides.folder.name, weights, run.args.torch_dtype]
        folder = cache_root() / "reference" / content_key(described)
        there = folder.is_dir()
        if not all(distributed.gathered(there)):
            logps = distributed.from_rank_zero(
                np.fromfile(folder / LOGPS, dtype=np.float32) if there else None
            )
            if logps is None:
                logps = self._measured(folder, sides, weights, models)
            get_or_build(folder, lambda made: logps.tofile(made / LOGPS))
        sides.attach_reference(folder / LOGPS)

    def _measured(
        self, folder: Path, sides: TokenDataset, weights: str, models: list[Any]
    ) -> np.ndarray[Any, Any]:
        measure: Measure = lambda forward: forward(answers_logps)  # noqa: E731
        if self.live is not None:
            self._check_there(weights)
            self.live.built(models, None)
            measure = self.live.measure
        pairs = PairDataset(TokenDataset(sides.folder))
        with evaluating(models, self.megatron):
            return reference_logps(folder, pairs, self.run, self.megatron, models, measure)

    def _check_there(self, weights: str) -> None:
        """UserError unless a continued run's reference is what --model names now."""
        here = distributed.on_rank_zero()
        now = distributed.from_rank_zero(self._identity(start=True) if here else "")
        if now != weights:
            raise UserError(
                "the log-probabilities of this run's reference are not in $SWIFTMEG_CACHE, and "
                "--model is not what it started from: name that by --ref_model or --ref_load"
            )

    def _weights(self) -> str:
        """What tells the reference's weights from others."""
        args = self.run.args
        if self.continued and not self.named:
            saved = saved_arguments(Path(getattr(args, args.continued)), args.ckpt_step)
            if (weights := getattr(saved, "reference_weights", None)) is not None:
                return str(weights)
        return self._identity(start=self.continued)

    def _identity(self, start: bool) -> str:
        """A hash of the weights' files, as far as names, sizes and times tell, and the config."""
        files = [
            [path.name, path.stat().st_size, path.stat().st_mtime_ns]
            for folder in self._folders(start)
            for path in sorted(folder.iterdir())
            if path.suffix in (".safetensors", ".distcp", ".bin", ".pt")
        ]
        args = self.run.args
        drawn = args.seed if args.new_special_tokens else None  # new rows of the embedding
        # Such adapters change the weights that they are added to.
        residual = args.is_lora and not start and args.init_lora_weights in RESIDUAL_STARTS
        return content_key([files, self.run.model.config, drawn, residual])

    def _folders(self, start: bool) -> list[Path]:
        """Where the reference's weights lie; with `start`, those that training started from."""
        run, args = self.run, self.run.args
        if args.ref_load:
            return [_iteration(Path(args.ref_load))]
        if args.ref_model:
            return [find_folder(args.ref_model, args.use_hf)]
        base = args.load if args.load and (args.is_lora or not start) else None
        folders = [_iteration(Path(base)) if base else run.model.folder]
        if not start:
            folders += [Path(folder).expanduser() for folder in args.adapters]
            if args.adapter_load:
                folders.append(_iteration(Path(args.adapter_load)))
        return folders


def _iteration(checkpoint: Path) -> Path:
    """The folder of a Megatron checkpoint's latest iteration."""
    folder = checkpoint.expanduser()
    return folder / read_iteration(folder)
