"""Flags and environment variables from a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from swiftmeg.args.commands import SftArguments
from swiftmeg.args.config import export_environment
from swiftmeg.args.flags import parse_flags
from swiftmeg.errors import UserError

TEXT = """
model: llama
dataset: [a.jsonl, b.jsonl]
lr: 1e-4
eval_iters: -1
packing: true
columns: {a: b}
template: null
save_steps: 5
ENV: {NPROC_PER_NODE: 2, FIRST: file}
"""
EXPECTED = {
    "model": "llama",
    "dataset": ["a.jsonl", "b.jsonl"],
    "lr": 1e-4,
    "eval_iters": -1,
    "packing": True,
    "columns": {"a": "b"},
    "save_interval": 5,
}


def parse(*words: Any) -> dict[str, Any]:
    return parse_flags(SftArguments, list(map(str, words)), "megatron sft")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def test_a_file_holds_flags(file: Path) -> None:
    assert parse(file) == parse("--config", file) == parse(f"--config={file}") == EXPECTED


def test_json_too(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"lr": 0.5, "strict": False}))
    assert parse(path) == {"lr": 0.5, "strict": False}


def test_flags_win_in_every_spelling(file: Path) -> None:
    words = ["--lr", "2", "--save_interval", "7", "--config", file]
    assert parse(*words) == EXPECTED | {"lr": 2.0, "save_interval": 7}


def test_the_environment_wins(file: Path) -> None:
    environ = {"FIRST": "shell"}
    export_environment([str(file)], environ)
    assert environ == {"FIRST": "shell", "NPROC_PER_NODE": "2"}


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.yaml", "mirco_batch_size: 1", "a.yaml: unknown flag --mirco_batch_size: did you mean"),
        ("a.yaml", "lr: fast", "a.yaml: --lr: 'fast' is not a finite number"),
        ("a.yaml", "[1]", "a.yaml: must hold `flag: value` pairs"),
        ("a.yaml", "a: [", "a.yaml: is not YAML"),
        ("a.txt", "lr: 1", "a.txt: name a file that ends in .yaml, .yml, .json"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, name: str, text: str, line: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=line):
        parse("--config", tmp_path / name)


def test_one_file_that_exists(file: Path) -> None:
    with pytest.raises(UserError, match="both are files of flags"):
        parse(file, "--config", file)
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read \(No such file"):
        parse("nowhere.yaml")
