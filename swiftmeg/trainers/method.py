"""What makes one way of training different from another, and what a run of it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from swiftmeg.args.commands import SftArguments
from swiftmeg.global_batch import WholeBatch
from swiftmeg.models.hf import HFModel
from swiftmeg.observer import Observer
from swiftmeg.trainers.training_data import TrainingData
from swiftmeg.tuners.peft_format import HFAdapters

Hook = Callable[[list[Any]], list[Any]]
"""Changes this rank's bare model parts before Megatron wraps them."""


@dataclass
class Run:
    """Everything a training method needs to know about its run."""

    args: Any
    sources: dict[str, str]
    model: HFModel
    method: "Method"
    folder: Path
    data: TrainingData
    adapters: HFAdapters | None
    """What the adapters start from, if not from scratch or a checkpoint."""


class Method(ABC):
    """A way of training; `METHODS` in methods.py names all of them.

    Objects are made before Megatron is imported, which takes ten seconds: what needs it is imported
    by `training`.
    """

    arguments: ClassVar[type[SftArguments]]
    """The flags of its command."""
    sides: ClassVar[int] = 1
    """Samples of an item: 2 of a pair."""

    @abstractmethod
    def prepare_data(self, args: Any, model: HFModel) -> TrainingData:
        """Read and tokenise --dataset and --val_dataset; needs no process group."""

    def sequences(self, data: Any) -> Any:
        """The set of rows, each a sample, that the items of a tokenised set are made of."""
        return data

    def megatron_flags(self, args: Any) -> dict[str, Any]:
        """Arguments of Megatron that are not as the flags say."""
        return {}

    def frozen_copies(self, args: Any) -> int:
        """Models of the trained one's size that are in memory beside it, for the plan."""
        return 0

    @abstractmethod
    def training(self, run: Run, megatron: Any) -> "Training":
        """What is done inside Megatron's loop; `megatron` is its namespace."""


class Training(ABC):
    """What a method does inside Megatron's loop, in one run."""

    def hooks(self) -> list[Hook]:
        """What is done to the model, behind the weights and adapters of the run."""
        return []

    def observers(self) -> list[Observer]:
        """What watches the loop beside the log and the checkpoints."""
        return []

    def whole_batch(self) -> WholeBatch | None:
        """What sees the micro-batches of a global batch before the model does, if anything."""
        return None

    @abstractmethod
    def forward_step(
        self, iterator: Iterator[dict[str, Tensor]], model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Run a model part on the next micro-batch.

        Returns its output, and what makes a loss of the last part's. That returns what this rank
        adds to the objective's numerator (its gradient is taken), what it adds to the denominator
        (int), and for the log {name: [numerator, denominator]}. Megatron sums all of them over the
        micro-batches and ranks of a global batch and divides once, so that a method's objective is
        sum(weight x loss) / sum(weight) over the global batch, however that is cut. A batch carries
        the weights (`weights`, see Collator), and losses of routers and prediction modules, which
        are divided by the same denominator, are weighted by them.
        """
