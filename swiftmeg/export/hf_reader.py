"""Fill a live Megatron model, in whatever layout it has, from a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from swiftmeg.errors import UserError
from swiftmeg.export.blocks import StoredPart
from swiftmeg.export.hf_files import TIED_HEAD, HFWeights, check_names, listed
from swiftmeg.export.lazy_weights import fill_all
from swiftmeg.export.shards import LiveWeight
from swiftmeg.models.family import EMBEDDING, OUTPUT, Family, HFConfig, Row
from swiftmeg.models.layout import Dims


class HFSupply:
    """An HF folder's weights, cut as this rank's parameters need them.

    Raises UserError, with names, for HF tensors that are missing, unknown or of the wrong shape,
    and for Megatron parameters without a source.
    """

    def __init__(self, weights: HFWeights, family: Family, config: HFConfig, dims: Dims) -> None:
        self._weights = weights
        self._family = family
        self._dims = dims
        self._plan = {each.mcore: each for each in check_names(family, config, weights)}
        self._is_tied = bool(config.get("tie_word_embeddings"))
        self._filled: set[str] = set()

    def fill(self, live: LiveWeight) -> None:
        """Copy one parameter's part of its HF tensors."""
        live.tensor.copy_(self._shard(live, live.rank, live.group_size))

    def shards(self, live: LiveWeight) -> list[torch.Tensor]:
        """All shards of one parameter, in its dtype."""
        size = live.pieces
        return [self._shard(live, rank, size).to(live.tensor.dtype) for rank in range(size)]

    def _shard(self, live: LiveWeight, rank: int, size: int) -> torch.Tensor:
        tied_head = live.name == OUTPUT and live.name not in self._plan
        row = self._plan.get(EMBEDDING if tied_head else live.name)
        if row is None:
            raise UserError(f"{self._family.architecture} has no weights for parameter {live.name}")
        parts = self._weights.parts(row)
        place = self._dims, live.axis, rank, size
        try:
            blocks = row.layout.cut(parts, *place)
        except UserError as error:
            raise UserError(_misfit(self._weights.folder, row, parts, str(error))) from None
        values = [block.read() for block in blocks]
        try:
            shard = row.layout.join_shard(values, *place)
        except RuntimeError as error:
            raise UserError(_misfit(self._weights.folder, row, parts, str(error))) from None
        if shard.shape != live.tensor.shape:
            expected = f"it makes a parameter of {tuple(live.tensor.shape)}"
            raise UserError(_misfit(self._weights.folder, row, parts, expected))
        self._check_copies(row, shard, place)
        self._filled.add(row.mcore)
        return shard

    def _check_copies(self, row: Row, shard: torch.Tensor, place: Any) -> None:
        """UserError unless HF tensors that repeat the row's, a tied head's too, have its values."""
        tied = (TIED_HEAD,) if row.mcore == EMBEDDING and self._is_tied else ()
        for name in {*row.copies, *tied} & self._weights.names():
            copy = dataclasses.replace(row, hf=(name,), stack=None)
            parts = self._weights.parts(copy)
            try:
                values = [block.read() for block in row.layout.cut(parts, *place)]
            except UserError as error:
                raise UserError(_misfit(self._weights.folder, copy, parts, str(error))) from None
            if not bool((row.layout.join_shard(values, *place) == shard).all()):
                reason = "config.json says tie_word_embeddings" if tied else "the model has one"
                raise UserError(
                    f"{self._weights.folder}: {name} has other values than {row.hf[0]}, but "
                    f"{reason}: make the two agree"
                )

    @property
    def bytes_read(self) -> int:
        """Bytes of HF tensors that this rank has read."""
        return self._weights.bytes_read

    def finish(self) -> None:
        """UserError unless all ranks together have taken every row; collective."""
        device = torch.cuda.current_device()
        flags = [name in self._filled for name in self._plan]
        taken = torch.tensor(flags, dtype=torch.uint8, device=device)
        torch.distributed.all_reduce(taken, op=torch.distributed.ReduceOp.MAX)
        left = {name for name, one in zip(self._plan, taken.tolist(), strict=True) if not one}
        if left:
            raise UserError(f"no parameter took the weights of {listed(left)}")


def load_hf(
    models: list[Any],
    folder: str | Path,
    family: Family,
    config: HFConfig,
    dims: Dims,
    weights: HFWeights | None = None,
) -> None:
    """Copy an HF folder's weights into this rank's shards, one tensor at a time.

    Every rank reads only what it holds; host memory in use beyond the model is about twice the
    largest parameter. Strict both ways, as HFSupply says. `weights` is another view of the folder
    than the plain one.
    """
    fill_all(models, HFSupply(weights or HFWeights(folder, config), family, config, dims))


def _misfit(folder: Path, row: Row, parts: list[StoredPart], reason: str) -> str:
    shapes = ", ".join(
        f"{name} {tuple(part.shape)}" for name, part in zip(row.hf, parts, strict=True)
    )
    return f"{folder}: {shapes}: the shape does not fit config.json ({reason}): make the two agree"
