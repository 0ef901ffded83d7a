"""Write a live Megatron model, in whatever layout it has, as a Hugging Face folder."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from swiftmeg.export.atomic_folder import building
from swiftmeg.export.lazy_weights import Weights, Whole
from swiftmeg.export.safetensors_writer import (
    TensorInfo,
    assign_files,
    write_files,
    write_slices,
)
from swiftmeg.export.shards import LiveWeight, live_weights
from swiftmeg.export.write_shares import Share, shares
from swiftmeg.json_files import INDEX
from swiftmeg.models.family import OUTPUT, Family, HFConfig, Row
from swiftmeg.models.layout import Dims

_WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|index\.json)")
_OWN_FILES = {"args.json", "config.json"}


def copy_model_files(
    source: Path, target: Path, dtype: torch.dtype, overrides: dict[str, Any]
) -> None:
    """Copy config, generation config, tokenizer and chat template; weights stay behind.

    Files are taken as published; only the dtype in config.json follows the weights written, and
    `overrides` take the place of its values.
    """
    for path in source.iterdir():
        if path.is_file() and path.name not in _OWN_FILES and not path.name.startswith("."):
            if not _WEIGHT_FILES.fullmatch(path.name):
                shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    config |= overrides
    if (rope := overrides.get("rope_parameters")) and "rope_theta" in config:
        # The spelling of transformers 4, which some readers still know alone.
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


@torch.no_grad()
def save_hf(
    models: list[Any],
    folder: Path,
    source: Path,
    family: Family,
    config: HFConfig,
    dims: Dims,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
    overrides: dict[str, Any] | None = None,
    weights: Weights | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write the model's weights as `dtype` safetensors into `folder`, files of `source` beside.

    Every rank writes a share of its own at the same time, one tensor in memory. Collective: all
    ranks call it. Vocabulary padding and copies (tied heads, data-parallel replicas) are left out.
    The folder appears under its name when it is complete. `weights` knows the values of weights
    that have none yet. `beside` writes more files into the folder, on the first rank.
    """
    plan = {each.mcore: each for each in family.plan(config)}
    written = [live for live in live_weights(models) if live.name != OUTPUT or OUTPUT in plan]
    first = torch.distributed.get_rank() == 0
    with building(folder, first) as unfinished:
        if first:
            copy_model_files(source, unfinished, dtype, overrides or {})
            if beside is not None:
                beside(unfinished)
        torch.distributed.barrier()
        values = weights or Whole()
        with values.in_turn():
            index = _write_share(written, values, unfinished, plan, dims, dtype, max_shard_bytes)
        torch.distributed.barrier()
        if first and len(set(index["weight_map"].values())) > 1:
            (unfinished / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    torch.distributed.barrier()


def _write_share(
    weights: list[LiveWeight],
    values: Weights,
    folder: Path,
    plan: dict[str, Row],
    dims: Dims,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """Write this rank's files; returns the index over the files of all ranks."""
    mine = list(zip(weights, shares(weights), strict=True))
    wholes = [(live, share) for live, share in mine if not plan[live.name].is_slice]
    slices = [(live, share) for live, share in mine if plan[live.name].is_slice]
    infos = [
        info
        for live, share in wholes
        if share.writes
        for info in hf_tensors_of(live, plan[live.name], dims, dtype)
    ]
    stacks = _stacks(slices, plan, dims, dtype)
    writers: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(writers, infos)
    files, index = assign_files([*writers, stacks], max_shard_bytes)
    tensors = _hf_tensors(wholes, values, plan, dims, dtype)
    write_files(
        folder,
        files[torch.distributed.get_rank()],
        ((name, tensor) for _, name, tensor in tensors),
    )
    parts = _hf_tensors(slices, values, plan, dims, dtype)
    write_slices(folder, files[-1], ((name, row.expert, part) for row, name, part in parts))
    return index


def _stacks(
    slices: list[tuple[LiveWeight, Share]], plan: dict[str, Row], dims: Dims, dtype: torch.dtype
) -> list[TensorInfo]:
    """The tensors that hold all experts of a layer, of which ranks write slices; collective."""
    counts = Counter(row.stack for row in plan.values() if row.is_slice)
    found = {}
    for live, _ in slices:
        (info,) = hf_tensors_of(live, plan[live.name], dims, dtype)
        shape = (counts[info.name], *info.shape)
        found[info.name] = dataclasses.replace(info, shape=shape)
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, found)
    return list({name: info for rank in ranks for name, info in rank.items()}.values())


def _dtype(row: Row, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if row.fp32 else dtype


def _names(row: Row) -> list[tuple[str, ...]]:
    """The names under which each part of a row is written."""
    first, *others = row.hf
    return [(first, *row.copies), *((name,) for name in others)]


def hf_tensors_of(live: LiveWeight, row: Row, dims: Dims, dtype: torch.dtype) -> list[TensorInfo]:
    """The HF tensors of a weight, found by moving meta tensors through its layout."""
    size = live.pieces
    shards = [torch.empty_like(live.tensor, device="meta") for _ in range(size)]
    parts = row.layout.split(row.layout.unshard(shards, live.axis), dims)
    return [
        TensorInfo(name, tuple(part.shape), _dtype(row, dtype))
        for names, part in zip(_names(row), parts, strict=True)
        for name in names
    ]


def _hf_tensors(
    weights: list[tuple[LiveWeight, Share]],
    values: Weights,
    plan: dict[str, Row],
    dims: Dims,
    dtype: torch.dtype,
) -> Iterator[tuple[Row, str, torch.Tensor]]:
    """The full HF tensors that this rank writes; it may take part in gathering its peers'."""
    for live, share in weights:
        shards = values.shards(live, share)
        if not share.writes:
            continue
        row = plan[live.name]
        parts = row.layout.split(row.layout.unshard(shards, live.axis), dims)
        for names, part in zip(_names(row), parts, strict=True):
            yield from ((row, name, part.to(_dtype(row, dtype))) for name in names)
