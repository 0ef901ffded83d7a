"""A run that is continued with other flags trains by them, and says how it differs."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.ranks import run_ranks
from tests.tiny import save_model

FIRST = {
    "train_iters": 2,
    "lr": 1e-3,
    "min_lr": 2e-4,
    "lr_decay_style": "linear",
    "lr_decay_iters": 8,
}
LORA = {"train_type": "lora", "lorap_lr_ratio": 4}
SGD = {"optimizer": "sgd", "use_distributed_optimizer": "false"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("otherwise")
    save_model(folder / "model", "llama", num_hidden_layers=2)
    rows = [{"query": f"question {i}", "response": "yes " * (1 + i % 5)} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(folder: Path, flags: dict[str, Any]) -> tuple[str, list[Any]]:
    """`megatron sft`; what it prints, and the optimizer's groups after each step."""
    from swiftmeg.cli.sft import main

    os.chdir(folder)
    os.environ["SWIFTMEG_CACHE"] = str(folder / "cache")
    common = {"model": "model", "dataset": "rows.jsonl", "global_batch_size": 4, "num_workers": 0}
    flags = common | {"log_interval": 1, "add_version": "false"} | flags
    groups = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            groups.append({name: value for name, value in group.items() if name != "params"})

    register_optimizer_step_post_hook(keep)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    return out.getvalue(), groups


def run(work: Path, save: str, flags: dict[str, Any]) -> tuple[str, list[Any], list[Any]]:
    """What a run prints, its groups at each step, and what it logs."""
    ((said, groups),) = run_ranks(1, train, work, flags | {"save": save})
    lines = (work / save / "logging.jsonl").read_text().splitlines()
    return said, groups, [json.loads(line) for line in lines]


def rate(step: float, peak: float, least: float) -> float:
    """The linear schedule of FIRST."""
    return least + (peak - least) * (1 - step / 8)


def test_flags_of_the_run_count(work: Path) -> None:
    run(work, "first", FIRST)
    changes = {"lr": 5e-4, "min_lr": 1e-4, "adam_beta2": 0.5, "adam_eps": 1e-4, "weight_decay": 0.3}
    flags = FIRST | changes | {"load": "first", "train_iters": 4, "global_batch_size": 2}
    said, groups, log = run(work, "changed", flags | {"max_length": 90})
    assert [line["global_step/max_steps"] for line in log] == ["3/4", "4/4"]
    assert [line["learning_rate"] for line in log] == pytest.approx(
        [rate(samples / 2, 5e-4, 1e-4) for samples in (10, 12)]
    )
    for group in groups:
        assert group["betas"] == (0.9, 0.5)
        assert (group["eps"], group["max_lr"], group["min_lr"]) == (1e-4, 5e-4, 1e-4)
        assert group["weight_decay"] == 0.3 * group["wd_mult"]
    table = said.split("not as in the run that --load continues:\n")[1]
    for row in (
        "max_length         90, was None",
        "lr                 0.0005, was 0.001",
        "min_lr             0.0001, was 0.0002",
        "adam_beta2         0.5, was 0.95",
        "global_batch_size  2, was 4",
    ):
        assert f"  {row}\n" in table
    assert "lr_decay_iters" not in table


def test_rates_that_are_not_given_are_those_of_the_saved_run(work: Path) -> None:
    """As if it had not stopped, but for a schedule that is stretched, which is said."""
    run(work, "first", FIRST)
    _, _, whole = run(work, "whole", FIRST | {"train_iters": 4})
    again = {"load": "first", "train_iters": 4, "lr_decay_style": "linear", "lr_decay_iters": 8}
    said, _, log = run(work, "again", again)
    keys = ("lm loss", "grad_norm", "learning_rate")
    assert [[line[key] for key in keys] for line in log] == [
        [line[key] for key in keys] for line in whole[2:]
    ]
    listed = [line.split() for line in said.splitlines()]
    assert ["lr", "0.001", "args.json"] in listed
    assert ["min_lr", "0.0002", "args.json"] in listed
    assert "not as in the run" not in said
    said, _, _ = run(work, "stretched", again | {"lr_decay_iters": 40})
    assert "  lr_decay_iters  40, was 8: the schedule of the learning rate is stretched\n" in said


@pytest.mark.parametrize(("name", "kind"), [("lora", LORA), ("sgd", SGD)])
def test_groups_of_other_optimizers_continue(work: Path, name: str, kind: dict[str, Any]) -> None:
    run(work, name, FIRST | kind)
    start = {"adapter_load" if name == "lora" else "load": name}
    flags = FIRST | kind | start | {"train_iters": 4, "lr": 5e-4}
    if name == "lora":
        del flags["train_type"], flags["lorap_lr_ratio"]
    _, groups, log = run(work, f"{name}-changed", flags)
    assert log[-1]["learning_rate"] == pytest.approx(rate(4, 5e-4, 2e-4))
    peaks = {group["max_lr"] for group in groups}
    assert peaks == ({5e-4, 2e-3} if name == "lora" else {5e-4})


def test_a_run_of_its_own_takes_no_rates(work: Path) -> None:
    run(work, "first", FIRST)
    said, _, _ = run(work, "own", {"load": "first", "finetune": "true", "train_iters": 1})
    assert not [line for line in said.splitlines() if line.split()[:1] == ["lr"]]
    assert "not as in the run" not in said
