"""Write a live Megatron model, in whatever layout it has, as a Hugging Face folder."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu

from swiftmeg.export.load import OUTPUT
from swiftmeg.export.shards import (
    LiveWeight,
    gather_shards,
    holds_first_copy,
    is_writer,
    live_weights,
)
from swiftmeg.export.weights import INDEX, assign_files, write_files
from swiftmeg.models.family import Family, HFConfig, Row
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
) -> None:
    """Write the model's weights as `dtype` safetensors into `folder`, files of `source` beside.

    Every pipeline stage writes its own shards at the same time. Collective: all ranks call it.
    Vocabulary padding and copies (tied heads, data-parallel replicas) are left out.
    """
    plan = {each.mcore: each for each in family.plan(config)}
    weights = [live for live in live_weights(models) if live.name != OUTPUT or OUTPUT in plan]
    writer = is_writer()
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        copy_model_files(source, folder, dtype, overrides or {})
    torch.distributed.barrier()
    if holds_first_copy():
        sizes = [
            (name, shape.numel() * dtype.itemsize)
            for live in weights
            for name, shape in _hf_shapes(live, plan[live.name], dims)
        ]
        stages: list[Any] = [None] * mpu.get_pipeline_model_parallel_world_size()
        group = mpu.get_pipeline_model_parallel_group()
        torch.distributed.all_gather_object(stages, sizes, group=group)
        files, index = assign_files(stages, max_shard_bytes)
        tensors = _hf_tensors(weights, plan, dims, dtype)
        if writer:
            write_files(folder, files[mpu.get_pipeline_model_parallel_rank()], tensors)
        else:
            for _ in tensors:  # take part in the gathers
                pass
        if torch.distributed.get_rank() == 0 and len(set(index["weight_map"].values())) > 1:
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    torch.distributed.barrier()


def _hf_shapes(live: LiveWeight, row: Row, dims: Dims) -> list[tuple[str, torch.Size]]:
    """HF names and shapes of a parameter, found by moving meta tensors through its layout."""
    size = mpu.get_tensor_model_parallel_world_size() if live.axis is not None else 1
    shards = [torch.empty_like(live.parameter, device="meta") for _ in range(size)]
    parts = row.layout.split(row.layout.unshard(shards, live.axis), dims)
    return [(name, part.shape) for name, part in zip(row.hf, parts, strict=True)]


def _hf_tensors(
    weights: list[LiveWeight], plan: dict[str, Row], dims: Dims, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Full HF tensors on writers, nothing on their tensor-parallel peers."""
    for live in weights:
        shards = gather_shards(live.parameter, live.axis)
        if not shards:
            continue
        row = plan[live.name]
        parts = row.layout.split(row.layout.unshard(shards, live.axis), dims)
        yield from ((name, part.to(dtype)) for name, part in zip(row.hf, parts, strict=True))
