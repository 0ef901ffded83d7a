"""Ranks read what they hold to fill a model, and all of a checkpoint once to convert it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.conversion import Layout, build
from tests.ranks import run_ranks
from tests.tiny import save_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"hidden_size": 128, "intermediate_size": 512}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "hidden_size": 128,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "gpt_oss": ("gpt_oss", {"hidden_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
SHARED = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}

CASES = [
    ("qwen3", Layout(4, tensor=4)),
    ("qwen3", Layout(4, tensor=2, pipeline=2)),
    ("qwen3", Layout(4)),
    ("qwen2_moe", Layout(4, tensor=2, expert=4, expert_tensor=1)),
    ("qwen2_moe", Layout(4, tensor=4, expert_tensor=4)),
    ("gpt_oss", Layout(4, tensor=4, expert=2, expert_tensor=2)),
]


@torch.no_grad()
def read_and_write(folder: str, out: str, layout: Layout) -> dict[str, int]:
    """Bytes that this rank reads to load a model, and to convert it both ways.

    The way back is from the checkpoint that a run of one process has left.
    """
    from swiftmeg.export.hf_files import HFWeights
    from swiftmeg.export.hf_reader import HFSupply, load_hf
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.lazy_weights import OnDemand
    from swiftmeg.export.mcore_reader import CheckpointSupply
    from swiftmeg.export.model import save_mcore
    from swiftmeg.export.shards import live_weights

    one, target = Path(out) / "one", Path(out) / str(layout)
    model, models, dims = build(Path(folder), layout)
    common = model.family, model.config, dims
    found = {"held": sum(live.tensor.nbytes for live in live_weights(models))}
    weights = HFWeights(folder, model.config)
    load_hf(models, folder, *common, weights)
    found["load"] = weights.bytes_read

    weights = HFWeights(folder, model.config)
    save_mcore(
        models, one if layout.world == 1 else target, OnDemand(models, HFSupply(weights, *common))
    )
    found["to mcore"] = weights.bytes_read

    _, models, _ = build(Path(folder), layout)
    stored = CheckpointSupply(models, one)
    values = OnDemand(models, stored)
    save_hf(models, target / "hf", model.folder, *common, dtype=torch.float32, weights=values)
    found["to hf"] = stored.bytes_read
    return found


@pytest.mark.parametrize("name", MODELS)
def test_ranks_read_what_they_need(name: str, tmp_path: Path) -> None:
    family, sizes = MODELS[name]
    folder = save_model(tmp_path / "model", family, **(sizes | SHARED))
    run_ranks(1, read_and_write, str(folder), str(tmp_path), Layout(1))
    size = (folder / "model.safetensors").stat().st_size
    for case, layout in CASES:
        if case != name:
            continue
        ranks = run_ranks(4, read_and_write, str(folder), str(tmp_path), layout)
        for rank in ranks:
            assert rank["load"] <= rank["held"], layout
        for step in ("to mcore", "to hf"):
            read = [rank[step] for rank in ranks]
            assert 0.95 * size < sum(read) < 1.15 * size, (layout, step, read)
            assert max(read) < 0.45 * size, (layout, step, read)
