"""LoRA runs on tiny models, and what they leave."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.layouts.test_training import rows, run_training
from tests.ranks import run_ranks
from tests.tiny import save_model

TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = TENSOR | {"sequence_parallel": "true"}
PIPELINE = {"pipeline_model_parallel_size": 2}


def write_inputs(folder: Path, models: dict[str, tuple[str, dict[str, Any]]]) -> Path:
    """Rows, and a model under each name: its family and sizes."""
    for name, (family, sizes) in models.items():
        save_model(folder / name, family, **sizes)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows(20)))
    return folder


def words(settings: dict[str, Any]) -> list[str]:
    """A command line; lists become several words."""
    line = []
    for name, value in settings.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def flags(work: Path, model: str, save: Path, changes: dict[str, Any]) -> list[str]:
    """`megatron sft` with LoRA for ten steps over all 20 rows."""
    settings = {
        "model": work / model,
        "dataset": work / "rows.jsonl",
        "train_type": "lora",
        "lora_rank": 4,
        "lora_dropout": 0,
        "train_iters": 10,
        "global_batch_size": 20,
        "lr": 2e-3,
        "weight_decay": 0.01,
        "lr_decay_style": "constant",
        "adam_eps": 1e-3,  # rounding of gradients near zero does not turn updates around
        "log_interval": 1,
        "num_workers": 0,
        "save": save,
        "add_version": "false",
        "save_safetensors": "true",
    }
    if "adapter_load" in changes:
        del settings["lora_dropout"], settings["lora_rank"]
    return words(settings | changes)


def train(
    work: Path, model: str, name: str, world: int = 1, **changes: Any
) -> list[dict[str, Any]]:
    """Run it; returns the lines of logging.jsonl."""
    run_ranks(world, run_training, flags(work, model, work / name, changes))
    return log(work, name)


def log(work: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a run's logging.jsonl."""
    return [json.loads(line) for line in (work / name / "logging.jsonl").read_text().splitlines()]


def adapters(work: Path, name: str, step: int = 10) -> dict[str, torch.Tensor]:
    """The tensors of the PEFT folder that a run wrote."""
    return load_file(work / name / f"iter_{step:07d}-hf" / "adapter_model.safetensors")


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()
    )
