"""A run's tokenised sets, up to the iterators that Megatron's loop draws from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from swiftmeg.data.collate import Collator, untrained
from swiftmeg.data.loader import BatchLoader, EvalLoader, eval_iters
from swiftmeg.observer import Observer, Step


@dataclass(kw_only=True)
class TrainingData:
    """Tokenised sets and how to batch them."""

    train: Any
    validation: Any | None
    collate: Collator
    longest: int
    """Tokens of the longest sample, or of a full pack."""
    train_iters: int
    """Optimizer steps."""
    args: Any
    filler: Callable[[Any], Any] = untrained
    """Makes of an item of `validation` one that weighs nothing: it fills up the last batch."""

    @property
    def eval_iters(self) -> int:
        """Batches per evaluation; 0 without a validation set."""
        if self.validation is None:
            return 0
        if self.args.eval_iters >= 0:
            return int(self.args.eval_iters)
        return eval_iters(len(self.validation), self.args.global_batch_size)

    def provider(self, megatron: Any) -> Callable[..., tuple[Any, Any, None]]:
        """What Megatron calls for its iterators, with its groups made and a checkpoint loaded."""
        from megatron.core import mpu

        def provide(sizes: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
            shared: dict[str, Any] = {
                "micro_batch_size": self.args.micro_batch_size,
                "global_batch_size": self.args.global_batch_size,
                "dp_rank": mpu.get_data_parallel_rank(),
                "dp_size": mpu.get_data_parallel_world_size(),
                "num_workers": self.args.num_workers,
            }
            validation = None
            if self.validation is not None:
                validation = EvalLoader(
                    self.validation, self.collate, filler=self.filler, **shared
                ).repeat()
            return iter(self.batches(megatron, shared)), validation, None

        return provide

    def batches(self, megatron: Any, shared: dict[str, Any]) -> Iterable[Any]:
        """This rank's training micro-batches, from where the run stands on."""
        return BatchLoader(
            self.train,
            self.collate,
            consumed_samples=megatron.consumed_train_samples,
            seed=self.args.seed,
            shuffle=self.args.dataloader_type != "single",
            **shared,
        )

    def resume(self, saved: Any) -> None:
        """Take what the namespace of a checkpoint that is continued says about the data."""

    def after_step(self, megatron: Any, iteration: int) -> None:
        """End the run by `megatron.train_iters` where there is no other step; collective."""

    def before_save(self, megatron: Any) -> None:
        """Put into Megatron's namespace, which is saved, what resuming needs; collective."""


class DataPosition(Observer):
    """Lets the data know of steps and checkpoints: a stream may end, and its position is saved."""

    def __init__(self, data: TrainingData, megatron: Any) -> None:
        self.data = data
        self.megatron = megatron

    def after_step(self, step: Step) -> None:
        self.data.after_step(self.megatron, step.iteration)

    def before_save(self, iteration: int) -> None:
        self.data.before_save(self.megatron)
