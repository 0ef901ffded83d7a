"""Fill a live Megatron model, in whatever layout it has, from a Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch

from swiftmeg.errors import UserError
from swiftmeg.export.shards import live_weights
from swiftmeg.export.weights import HFWeights, check_names, listed
from swiftmeg.models.family import Family, HFConfig, Row
from swiftmeg.models.layout import Dims

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@torch.no_grad()
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
    largest parameter. Strict both ways: raises UserError, with names, for HF tensors that are
    missing, unknown or of the wrong shape, and for Megatron parameters without a source. `weights`
    is another view of the folder than the plain one.
    """
    weights = weights or HFWeights(folder, config)
    plan = {each.mcore: each for each in check_names(family, config, weights)}
    filled: set[str] = set()
    for live in live_weights(models):
        tied_head = live.name == OUTPUT and live.name not in plan
        row = plan.get(EMBEDDING if tied_head else live.name)
        if row is None:
            raise UserError(f"{family.architecture} has no weights for parameter {live.name}")
        parts = weights.parts(row)
        try:
            shard = row.layout.join_shard(parts, dims, live.axis, *live.place)
        except (UserError, RuntimeError) as error:
            raise UserError(_misfit(weights.folder, row, parts, str(error))) from None
        if shard.shape != live.tensor.shape:
            expected = f"it makes a parameter of {tuple(live.tensor.shape)}"
            raise UserError(_misfit(weights.folder, row, parts, expected))
        live.tensor.copy_(shard)
        filled.add(row.mcore)
    _check_filled(plan, filled)


def _misfit(folder: Path, row: Row, parts: list[torch.Tensor], reason: str) -> str:
    shapes = ", ".join(
        f"{name} {tuple(part.shape)}" for name, part in zip(row.hf, parts, strict=True)
    )
    return f"{folder}: {shapes}: the shape does not fit config.json ({reason}): make the two agree"


def _check_filled(plan: dict[str, Row], filled: set[str]) -> None:
    """All ranks together must have taken every row."""
    device = torch.cuda.current_device()
    taken = torch.tensor([name in filled for name in plan], dtype=torch.uint8, device=device)
    torch.distributed.all_reduce(taken, op=torch.distributed.ReduceOp.MAX)
    if left := {name for name, one in zip(plan, taken.tolist(), strict=True) if not one}:
        raise UserError(f"no parameter took the weights of {listed(left)}")
