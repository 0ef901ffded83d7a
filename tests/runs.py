"""Commands as tests start them: flags in, the ranks of a job, and what a run leaves."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks

Flags = dict[str, Any]
"""Flags by name, without dashes; a list becomes several words."""

TENSOR: Flags = {"tensor_model_parallel_size": 2}
SEQUENCE: Flags = TENSOR | {"sequence_parallel": "true"}
PIPELINE: Flags = {"pipeline_model_parallel_size": 2}
EXPERT: Flags = {"expert_model_parallel_size": 2}

BALANCED: Flags = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.05}

DESCENT: Flags = {
    "optimizer": "sgd",
    "sgd_momentum": 0,
    "lr": 64.0,
    "min_lr": 64.0,
    "lr_decay_style": "constant",
    "weight_decay": 0,
    "clip_grad": 0,
    "use_distributed_optimizer": "false",
    "train_iters": 1,
    "global_batch_size": 20,
    "save_safetensors": "true",
}
"""A step of plain descent over 20 rows: what it changes is the gradient times its rate."""


def words(flags: Flags) -> list[str]:
    """A command line."""
    line = []
    for name, value in flags.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def training(work: Path, save: Path, model: str = "model", **changes: Any) -> list[str]:
    """The words of a short training of `work`/`model` on `work`/rows.jsonl; `changes` win."""
    return words(
        {
            "model": work / model,
            "dataset": work / "rows.jsonl",
            "micro_batch_size": 1,
            "lr": 1e-3,
            "log_interval": 1,
            "num_workers": 0,
            "save": save,
            "add_version": "false",
        }
        | changes
    )


def command(name: str, argv: list[str]) -> None:
    """`megatron sft`, `swift export`, ... on this rank of a job."""
    importlib.import_module(f"swiftmeg.cli.{name}").main(argv)


def run(name: str, world: int, argv: list[str]) -> None:
    """A command on `world` ranks; RuntimeError with a rank's own error."""
    run_ranks(world, command, name, argv)


def export(target: Path, world: int = 1, **flags: Any) -> Path:
    """`swift export` to `target`."""
    run("export", world, words({"output_dir": target} | flags))
    return target


def train_steps(
    work: Path, model: str, name: str, world: int, flags: Flags
) -> list[dict[str, Any]]:
    """Train `work`/`model` in a layout into `work`/`model`-`name`; returns what it logged."""
    steps = {"train_iters": 10, "global_batch_size": 8, "no_save_optim": "true"}
    save = work / f"{model}-{name}"
    run("sft", world, training(work, save, model, **steps | flags))
    return logged(save)


def logged(save: Path) -> list[dict[str, Any]]:
    """The lines of a run's logging.jsonl."""
    return [json.loads(line) for line in (save / "logging.jsonl").read_text().splitlines()]


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
