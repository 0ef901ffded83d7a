"""What makes one way of training different from another, and what a run of it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from swiftmeg.args.commands import SftArguments
from swiftmeg.models.hf import HFModel
from swiftmeg.observer import Observer
from swiftmeg.trainers.training_data import TrainingData
from swiftmeg.tuners.peft_format import HFAdapters

ForwardStep = Callable[..., tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]]
"""Megatron's: (micro-batches, model part) -> (its output, what makes a loss of that).

The second returns what this rank adds to the objective's numerator (its gradient is taken), what
it adds to the denominator (int), and for the log {name: [numerator, denominator]}. Megatron sums
all of them over the micro-batches and ranks of a global batch and divides once, so that a method's
objective is sum(weight x loss) / sum(weight) over the global batch, however that is cut. A batch
carries the weights (`weights`, see Collator), and losses of routers and prediction modules, which
are divided by the same denominator, are weighted by them.
"""

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
    inside the methods that are called later.
    """

    arguments: ClassVar[type[SftArguments]]
    """The flags of its command."""

    @abstractmethod
    def prepare_data(self, args: Any, model: HFModel) -> TrainingData:
        """Read and tokenise --dataset and --val_dataset; needs no process group."""

    def sequences(self, item: Any) -> dict[str, dict[str, Any]]:
        """The encoded rows of an item of `TrainingData.train`, under the names of its sides."""
        return {"": item}

    def hooks(self, run: Run, megatron: Any) -> list[Hook]:
        """What is done to the model, behind the weights and adapters of the run."""
        return []

    def observers(self, run: Run, megatron: Any) -> list[Observer]:
        """What watches the loop beside the log and the checkpoints."""
        return []

    @abstractmethod
    def forward_step(self, run: Run) -> ForwardStep:
        """What Megatron's schedules call for every micro-batch."""
