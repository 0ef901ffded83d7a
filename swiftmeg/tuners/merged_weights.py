"""The weights of a Hugging Face folder with a PEFT adapter added, each when it is asked for."""

import dataclasses
from collections import defaultdict
from functools import partial

import torch
from torch import Tensor

from swiftmeg import distributed
from swiftmeg.args.adapter_config import RESIDUAL_STARTS, AdapterConfig
from swiftmeg.errors import UserError
from swiftmeg.export.blocks import Block, StoredPart, whole
from swiftmeg.export.hf_files import TIED_HEAD, HFWeights, listed
from swiftmeg.export.hf_reader import HFSupply
from swiftmeg.models.family import Row
from swiftmeg.models.hf import HFModel
from swiftmeg.models.layout import Dims
from swiftmeg.tuners.peft_format import EMBEDDING, Factors, HFAdapters
from swiftmeg.tuners.residual import first_factors
from swiftmeg.tuners.tables import is_embedding

_AT_A_TIME = 2**20
"""Numbers of a weight that are merged in fp32 at a time."""


def rows_at_a_time(weight: Tensor) -> int:
    """How many rows of a matrix are merged at a time."""
    return max(1, _AT_A_TIME // weight.shape[1])


class MergedWeights(HFWeights):
    """An HF folder's weights with an adapter added, in fp32 and not rounded.

    `model` is what the adapter leaves (`settle_tables`). UserError for shapes that do not fit.
    """

    def __init__(self, model: HFModel, config: AdapterConfig, adapters: HFAdapters) -> None:
        super().__init__(model.folder, model.config)
        self._adapters = adapters
        self._config = config
        self._untied = model.overrides.get("tie_word_embeddings") is False
        self._tied = bool(model.config.get("tie_word_embeddings"))
        plan = model.family.plan(model.config)
        self._rows = {name: (row, place) for row in plan for place, name in enumerate(row.hf)}
        self._starts: dict[str, tuple[Tensor, Tensor]] = {}
        self._norms: dict[str, Tensor] = {}
        self.merged: dict[str, bool] = {}
        """Weights that were asked for and have an adapter, and whether it changed a number."""

    def names(self) -> set[str]:
        """Every tensor's name, a head's too where an adapter made one."""
        stored = super().names()
        if self._tied:
            return stored - {TIED_HEAD}
        return stored | ({TIED_HEAD} if self._untied else set())

    def parts(self, row: Row) -> list[StoredPart]:
        """The HF tensors of a row, with what the adapter makes of them."""
        return [
            part.then(partial(self._merge, name)) if name in self._adapters.changed else part
            for name, part in zip(row.hf, self._base_parts(row), strict=True)
        ]

    def _base_parts(self, row: Row) -> list[StoredPart]:
        """What the adapter stands beside: tensors of the folder, or those that came with it."""
        source = row
        if self._untied and row.hf == (TIED_HEAD,) and TIED_HEAD not in super().names():
            source = dataclasses.replace(row, hf=(f"model.{EMBEDDING}.weight",))
        parts = super().parts(source)
        for place, name in enumerate(row.hf):
            if (stored := self._adapters.trained.get(name)) is not None:
                is_table = name in (f"model.{EMBEDDING}.weight", TIED_HEAD)
                skipped = 1 if is_table else 0  # rows were compared when the adapter was read
                self._check(name, tuple(stored.shape), tuple(parts[place].shape), skipped)
                parts[place] = StoredPart(stored.__getitem__, stored.shape)
        for name, part in zip(row.hf, parts, strict=True):
            self._check_shapes(name, tuple(part.shape))
        return parts

    def _check_shapes(self, name: str, shape: tuple[int, ...]) -> None:
        if (factors := self._adapters.factors.get(name)) is not None:
            a, b = factors.a.shape[1], factors.b.shape[0]
            self._check(f"the adapter of {name}", (a, b) if is_embedding(name) else (b, a), shape)
            if factors.magnitude is not None:
                out = shape[1:] if is_embedding(name) else shape[:1]
                self._check(f"the magnitudes of {name}", tuple(factors.magnitude.shape), out)
        if name in self._adapters.tokens:
            values = self._adapters.tokens[name][1]
            self._check(f"the token rows of {name}", tuple(values.shape), shape, 1)
        if name in self._adapters.added:
            self._check(f"the bias beside {name}", tuple(self._adapters.added[name].shape), shape)

    def _check(
        self, what: str, found: tuple[int, ...], wanted: tuple[int, ...], skipped: int = 0
    ) -> None:
        if found[skipped:] != wanted[skipped:]:
            raise UserError(
                f"--adapters {self._config.folder}: {what} is for a tensor {found}, but the "
                f"model's is {wanted}: name the model that the adapter was made for"
            )

    def _merge(self, name: str, tensor: Tensor, block: Block) -> Tensor:
        if name in self._adapters.trained and name not in self.merged:
            self.merged[name] = True
        merged = tensor.to(torch.float32, copy=True)
        if (factors := self._adapters.factors.get(name)) is not None:
            self._add(name, merged, factors, block)
        if name in self._adapters.tokens:
            numbers, values = self._adapters.tokens[name]
            for number, value in zip(numbers, values, strict=True):
                if block[0].start <= number < block[0].stop:
                    merged[number - block[0].start] = value[block[1]]
        if name in self._adapters.added:
            merged += self._adapters.added[name][block]
        changed = name in self._adapters.trained or bool((merged != tensor).any())
        self.merged[name] = self.merged.get(name, False) or changed
        return merged

    def _add(self, name: str, merged: Tensor, factors: Factors, block: Block) -> None:
        """Add an adapter to a block of its weight, some rows at a time."""
        start = self._start(name, factors)
        direction = None
        if factors.magnitude is not None:
            direction = factors.magnitude.float() / self._norm(name, factors)
            direction = (
                direction[None, block[1]] if is_embedding(name) else direction[block[0], None]
            )
        first = 0
        for rows in merged.split(rows_at_a_time(merged)):
            part = slice(block[0].start + first, block[0].start + first + len(rows))
            rows.add_(_product(name, factors, (part, block[1])))
            if start is not None:
                rows.sub_(factors.scale * (start[1][part] @ start[0][:, block[1]]))
            if direction is not None:
                rows.mul_(
                    direction if len(direction) == 1 else direction[first : first + len(rows)]
                )
            first += len(rows)

    def _base(self, name: str) -> Tensor:
        """All of a weight as the adapter found it, in fp32."""
        row, place = self._rows[name]
        return self._base_parts(row)[place].read().float()

    def _start(self, name: str, factors: Factors) -> tuple[Tensor, Tensor] | None:
        """The factors that were taken out of a weight; None where it stayed, or came along."""
        start = self._config.start
        if start not in RESIDUAL_STARTS or is_embedding(name) or name in self._adapters.trained:
            return None
        if name not in self._starts:
            weight = self._base(name)
            self._starts[name] = first_factors(start, weight, factors.rank, factors.scale)
        return self._starts[name]

    def _norm(self, name: str, factors: Factors) -> Tensor:
        """Norms of the rows (a looked-up table's columns) of a weight and its adapter [out]."""
        if name not in self._norms:
            weight = self._base(name)
            if (start := self._start(name, factors)) is not None:
                weight -= factors.scale * (start[1] @ start[0])
            squares = torch.zeros(weight.shape[int(is_embedding(name))])
            first = 0
            for rows in weight.split(rows_at_a_time(weight)):
                part = slice(first, first + len(rows))
                square = (rows + _product(name, factors, (part, whole(weight.shape)[1]))).square()
                if is_embedding(name):
                    squares += square.sum(0)
                else:
                    squares[part] = square.sum(1)
                first += len(rows)
            self._norms[name] = squares.sqrt()
        return self._norms[name]


def _product(name: str, factors: Factors, block: Block) -> Tensor:
    """A block of scale * B @ A in the form of the weight, in fp32."""
    a, b = factors.a, factors.b
    if is_embedding(name):
        a, b = b.t(), a.t()  # a table maps one-hot vectors
    product: Tensor = factors.scale * (b[block[0]].float() @ a[:, block[1]].float())
    return product


class MergedSupply(HFSupply):
    """Merged weights for a live model; counts in the end what the adapter changed."""

    def __init__(
        self, weights: MergedWeights, adapters: HFAdapters, model: HFModel, dims: Dims
    ) -> None:
        super().__init__(weights, model.family, model.config, dims)
        self._merged = weights
        self._adapters = adapters

    def finish(self) -> None:
        """UserError unless every adapted weight was merged, on all ranks together; collective."""
        super().finish()
        ranks: list[dict[str, bool]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, self._merged.merged)
        changed: dict[str, bool] = defaultdict(bool)
        for name, one in (pair for rank in ranks for pair in rank.items()):
            changed[name] |= one
        if left := self._adapters.changed - changed.keys():
            raise UserError(
                f"{len(self._adapters.changed)} weights have an adapter, but {len(changed)} were "
                f"merged: {listed(left)} were left out"
            )
        if distributed.on_rank_zero():
            print(self._report(changed), flush=True)

    def _report(self, changed: dict[str, bool]) -> str:
        replaced = self._adapters.trained.keys() - self._adapters.factors.keys()
        added = changed.keys() - replaced
        same = {name for name in added if not changed[name]}
        line = f"merged {len(added)} weights with their adapters, {len(added - same)} of which "
        line += f"change; {len(replaced)} were replaced"
        return line + (f"; these stay, since their B @ A is 0: {listed(same)}" if same else "")
