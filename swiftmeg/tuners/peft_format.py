"""What PEFT folders hold, by the names of the Hugging Face weights that it changes. No Megatron.

transformers 5 holds a layer's routed experts as two three-dimensional parameters. PEFT adapts such
a parameter (`target_parameters`) with the factors of all experts in one pair of matrices: A lists
expert after expert, in B the expert changes fastest. In a model with such experts PEFT takes every
target module that is called like a published expert's layer for those experts, so the dense layers
and shared experts of that name are listed by their parameters, too.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from torch import Tensor

from swiftmeg.models.family import Row
from swiftmeg.models.hf import HFModel

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What every name in it begins with."""

EMBEDDING = "embed_tokens"
"""Last part of the name of every family's word embedding."""


@dataclass(frozen=True)
class Factors:
    """A weight's adapter: A [rank, in], B [out, rank]; a table's [rank, rows], [size, rank]."""

    a: Tensor
    b: Tensor
    alpha: float
    scale: float
    """What B @ A is multiplied by."""
    magnitude: Tensor | None = None
    """DoRA's norms of the weight's rows [out]; for a table of its columns [size]."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    def copied(self) -> "Factors":
        """The same in memory of its own."""
        magnitude = None if self.magnitude is None else self.magnitude.clone()
        return replace(self, a=self.a.clone(), b=self.b.clone(), magnitude=magnitude)


@dataclass
class HFAdapters:
    """Whole tensors on the CPU, by the names of the HF weights that they change or replace."""

    factors: dict[str, Factors] = field(default_factory=dict)
    """Weights with an adapter, which is added to `trained` where that has the weight, too."""
    trained: dict[str, Tensor] = field(default_factory=dict)
    """Weights and biases that are stored whole."""
    tokens: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    """Tables of which some rows are trained: their numbers, and their values [rows, size]."""
    added: dict[str, Tensor] = field(default_factory=dict)
    """What is added to biases."""

    def copied(self) -> "HFAdapters":
        """Factors and whole tensors of a live model, in memory of their own."""
        return HFAdapters(
            {name: each.copied() for name, each in self.factors.items()},
            {name: tensor.clone() for name, tensor in self.trained.items()},
        )

    @property
    def changed(self) -> set[str]:
        """The names of all weights that are changed or replaced."""
        return {*self.factors, *self.trained, *self.tokens, *self.added}


def weight_names(model: HFModel) -> set[str]:
    """Every weight of a model, as published."""
    return {name for row in model.family.plan(model.config) for name in row.hf}


def live_name(name: str) -> str:
    """The name that a published weight has in transformers' model."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def expert_stacks(model: HFModel) -> dict[str, list[Row]]:
    """transformers' stacked parameters, and the rows of the experts in each, in order."""
    stacks: dict[str, list[Row]] = defaultdict(list)
    for row in model.family.plan(model.config):
        if row.stack is not None:
            stacks[row.stack].append(row)
    return {name: sorted(rows, key=lambda row: row.expert) for name, rows in stacks.items()}
