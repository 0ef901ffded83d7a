"""A conversion that is killed leaves its target as it was, and what it wrote is refused."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftmeg.checkpoint import check_checkpoint
from swiftmeg.errors import UserError
from swiftmeg.models.hf import read_model
from tests.cli.commands import snapshot
from tests.kills import exit_codes, work_and_die
from tests.runs import run
from tests.tiny import save_model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and both in Megatron's form."""
    folder = tmp_path_factory.mktemp("kills")
    for name, layers in (("old", 2), ("new", 4)):
        save_model(folder / name, "qwen3", num_hidden_layers=layers)
        run("export", 1, to_mcore(folder / name, folder / f"{name}-mcore"))
    return folder


def to_mcore(model: Path, target: Path) -> list[str]:
    return ["--model", str(model), "--to_mcore", "true", "--output_dir", str(target)]


def to_hf(checkpoint: Path, target: Path) -> list[str]:
    words = ["--mcore_model", str(checkpoint), "--to_hf", "true", "--output_dir", str(target)]
    return [*words, "--max_shard_size", "300KB"]


Point = tuple[int, str, int]
"""Processes, the file in which one of them dies, and its size at that moment."""


def die_and_do_it_again(
    old: Path, target: Path, point: Point, words: list[str], read: Callable[[Path], Any]
) -> None:
    """A conversion over `old` dies at `point`, leaves it as it was, and succeeds when repeated."""
    shutil.copytree(old, target)
    before = snapshot(target)
    world, file, size = point
    command = [*words, "--exist_ok", "true"]
    codes = exit_codes(world, work_and_die, file, size, "export", command)
    assert codes.count(-signal.SIGXFSZ) == 1, codes
    assert None not in codes, f"hangs: {codes}"
    assert snapshot(target) == before
    read(target)
    if world == 1:  # of several, those that live on have removed it
        with pytest.raises(UserError, match=r"\.target\.unfinished: .*was not completed"):
            read(target.with_name(".target.unfinished"))
    run("export", 1, command)
    assert [entry.name for entry in target.parent.iterdir()] == ["target"]
    assert snapshot(target) != before


MCORE_POINTS = [
    (1, r"__0_0\.distcp$", 100_000),
    (1, r"/\.metadata", 100),
    (1, r"latest_checkpointed_iteration", 0),
    (1, r"args_sources", 0),
    (4, r"__2_0\.distcp$", 50_000),
]


@pytest.mark.parametrize("point", MCORE_POINTS, ids=str)
def test_killed_on_the_way_to_megatron(work: Path, tmp_path: Path, point: Point) -> None:
    target = tmp_path / "target"
    words = to_mcore(work / "new", target)
    die_and_do_it_again(
        work / "old-mcore",
        target,
        point,
        words,
        lambda f: check_checkpoint("--mcore_model", str(f)),
    )


HF_POINTS = [
    (1, r"model-00002-of-.*safetensors$", 100_000),
    (1, r"safetensors\.index\.json", 10),
    (4, r"model-00003-of-.*safetensors$", 50_000),
]


@pytest.mark.parametrize("point", HF_POINTS, ids=str)
def test_killed_on_the_way_to_hugging_face(work: Path, tmp_path: Path, point: Point) -> None:
    target = tmp_path / "target"
    words = to_hf(work / "new-mcore", target)
    die_and_do_it_again(work / "old", target, point, words, lambda f: read_model(str(f)))
