"""Losses over a set of rows are those of transformers; tests/matrix/ compares training steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.tiny import save_model

SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": "true"}
PIPELINE = {"pipeline_model_parallel_size": 2}
QWEN3 = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2-sp-padded": (
        2,
        SEQUENCE | {"padding_free": "false", "micro_batch_size": 2, "loss_scale": "react"},
    ),
    "pp2-cp2": (4, PIPELINE | {"context_parallel_size": 2, "loss_scale": "last_round+react"}),
    "dp2": (2, {}),
}
"""Processes and flags of a layout, some with weights of tokens in the loss."""


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations of very different lengths, some of two turns."""
    made = []
    for i in range(count):
        turns = [{"role": "user", "content": f"question {i} " + "x" * (7 * i % 40)}]
        answer = "yes " * (1 + 5 * i % 13) + ("Action: look " if i % 4 == 1 else "")
        turns.append({"role": "assistant", "content": answer})
        if i % 3 == 0:
            turns += [
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": f"{i}."},
            ]
        made.append({"messages": turns})
    return made


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    save_model(folder / "qwen3", "qwen3", **QWEN3)
    lines = [json.dumps(row) for row in rows(20)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


ONE_STEP: dict[str, Any] = {
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
"""A step of plain descent over all rows: what it changes is the gradient times its rate."""


def run_training(argv: list[str]) -> None:
    """`megatron sft` inside an existing job."""
    from swiftmeg.args.commands import SftArguments
    from swiftmeg.args.read import read_training_arguments
    from swiftmeg.trainers.methods import METHODS
    from swiftmeg.trainers.run import train

    train(*read_training_arguments(SftArguments, argv, "megatron sft"), METHODS["sft"])


def train_steps(
    work: Path, family: str, name: str, world: int, flags: dict[str, Any]
) -> list[dict[str, Any]]:
    """Train a family's tiny model in a layout; returns the lines of logging.jsonl."""
    settings = {
        "model": work / family,
        "dataset": work / "rows.jsonl",
        "train_iters": 10,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "lr": 1e-3,
        "log_interval": 1,
        "num_workers": 0,
        "save": work / f"{family}-{name}",
        "add_version": "false",
        "no_save_optim": "true",
    } | flags
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    run_ranks(world, run_training, argv)
    log = Path(settings["save"]) / "logging.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b))


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def transformers_loss(model: Any, folder: Path, **template_options: Any) -> torch.Tensor:
    """Mean loss per trained token over all rows, one row at a time."""
    from transformers import AutoTokenizer

    from swiftmeg.data.template.template import Template

    template = Template(AutoTokenizer.from_pretrained(folder), **template_options)
    total, count = torch.zeros(()), 0
    for row in rows(20):
        encoded = template.encode(row)
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(encoded["labels"])[1:]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        weights = torch.tensor(encoded.get("loss_scale", [1.0] * len(encoded["labels"])))[1:]
        total = total + (losses * weights).sum()
        count += int((labels != -100).sum())
    return total / count


FROZEN = {"lr": 0, "train_iters": 1, "global_batch_size": 10, "no_save_rng": "true"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_is_the_loss_over_all_rows(work: Path, layout: str) -> None:
    """20 rows in global batches of 8: the last one is filled up, and that must not show."""
    from transformers import AutoModelForCausalLM

    world, flags = LAYOUTS[layout]
    flags = flags | FROZEN | {"val_dataset": work / "rows.jsonl", "global_batch_size": 8}
    lines = train_steps(work, "qwen3", f"eval-{layout.replace(' ', '-')}", world, flags)
    model = AutoModelForCausalLM.from_pretrained(work / "qwen3", dtype=torch.float32)
    with torch.no_grad():
        options = {key: value for key, value in flags.items() if key == "loss_scale"}
        expected = transformers_loss(model, work / "qwen3", **options).item()
        unweighted = transformers_loss(model, work / "qwen3").item()
    assert relative(lines[-1]["eval_lm loss"], expected) <= 1e-5
    assert ("loss_scale" in flags) == (relative(expected, unweighted) > 1e-2)


def test_pt_trains_on_every_token(work: Path) -> None:
    from transformers import AutoModelForCausalLM

    flags = FROZEN | {"use_chat_template": "false", "loss_scale": "all", "global_batch_size": 20}
    (line,) = train_steps(work, "qwen3", "pt", 1, flags)
    model = AutoModelForCausalLM.from_pretrained(work / "qwen3", dtype=torch.float32)
    options = {"use_chat_template": False, "loss_scale": "all"}
    with torch.no_grad():
        expected = transformers_loss(model, work / "qwen3", **options).item()
    assert relative(line["lm loss"], expected) <= 1e-5
