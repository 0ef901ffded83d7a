"""A run that leaves the numbers ends in one line, and what it saved before stays the latest."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftmeg import checkpoint
from swiftmeg.unpickling import INDEX, read_index
from tests.cli.commands import Case, check_message, run_forked, sft
from tests.tiny import save_model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divergence")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    save_model(folder / "llama", "llama", num_hidden_layers=2, **sizes)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(16):
            ask = {"role": "user", "content": f"question {i}"}
            row = {"messages": [ask, {"role": "assistant", "content": "yes " * (1 + i % 4)}]}
            file.write(json.dumps(row) + "\n")
    broken = Path(shutil.copytree(folder / "llama", folder / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return folder


def diverging(save: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"save": save, "train_iters": 8, "save_interval": 1, "lr": 1e-4}
    settings |= {"log_interval": 1, "add_version": "false", "lr_decay_style": "constant"}
    return sft(**(settings | changes))


def test_lr_must_be_finite(work: Path, tmp_path: Path) -> None:
    for name, value in (("lr", "inf"), ("lr", "nan"), ("clip_grad", "inf")):
        case = Case("", diverging(tmp_path / "out", **{name: value}), "")
        code, text = run_forked(case, work, tmp_path)
        assert code == 1
        check_message(text, f"--{name}: '{value}' is not a finite number")


def test_weights_must_be_finite(work: Path, tmp_path: Path) -> None:
    case = Case("", diverging(tmp_path / "out", model="broken"), "", late=True)
    code, text = run_forked(case, work, tmp_path)
    assert code == 1
    check_message(
        text, r"--model .*broken: weight decoder.layers.1.mlp.linear_fc1.weight holds val"
    )
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_where_it_is_told_to(work: Path, tmp_path: Path) -> None:
    """But weights that are no numbers are not saved."""
    changes = {"no_check_for_nan_in_loss_and_grad": "true", "train_iters": 4, "save_interval": 4}
    case = Case("", diverging(tmp_path / "out", lr=1e30, **changes), "", late=True)
    code, text = run_forked(case, work, tmp_path)
    assert code == 3
    check_message(text, r"iteration 4: weight .* holds values that are not finite: .*no checkpoint")


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(work: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    code, text = run_forked(Case("", diverging(save, lr=1e30), "", late=True), work, tmp_path)
    assert code == 3, text
    check_message(text, r"iteration \d: .*: the run has diverged and ends; .*iter_0.* stays the la")
    number = checkpoint.read_tracker(save)
    assert isinstance(number, int)
    assert number >= 1
    iteration = save / checkpoint.folder_name(number)
    assert checkpoint.missing(iteration) is None
    for key, place in read_index(iteration / INDEX).storage_data.items():
        if key.fqn.endswith("weight") and not key.fqn.startswith("optimizer"):
            tensor = torch.load(checkpoint.read_entry(iteration, place), weights_only=True)
            assert tensor.isfinite().all(), key.fqn
    assert not (save / ".lock").exists()
