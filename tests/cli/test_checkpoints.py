"""Checkpoints survive what happens to jobs: kills at any moment, SIGTERM, damaged files."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swiftmeg import checkpoint
from swiftmeg.checkpoint import TRACKER
from swiftmeg.unpickling import INDEX, read_index
from tests.kills import exit_codes, work_and_die
from tests.ranks import fork_context, free_port, rank_main, run_ranks
from tests.runs import command, run, training
from tests.tiny import save_model

STEPS = 8
KILLS = int(os.environ.get("KILLS", "4"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows of different lengths."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    save_model(folder / "model", "llama", num_hidden_layers=2, **sizes)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(20):
            ask = {"role": "user", "content": f"question {i} " + "x" * (7 * i % 20)}
            answer = {"role": "assistant", "content": "yes " * (1 + 5 * i % 7)}
            file.write(json.dumps({"messages": [ask, answer]}) + "\n")
    return folder


def flags(work: Path, save: Path, **changes: Any) -> list[str]:
    """A command that starts a run and continues it, whichever is due."""
    settings = {
        "train_iters": STEPS,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "hidden_dropout": 0.1,
        "deterministic_mode": "true",
        "save_interval": 1,
        "load": save,
        "exit_on_missing_checkpoint": "false",
    } | changes
    return training(work, save, **settings)


def train_into(argv: list[str], output: Path) -> None:
    """`megatron sft`, with what the process prints in a file."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    command("sft", argv)


def log_steps(folder: Path) -> list[int]:
    lines = (folder / "logging.jsonl").read_text().splitlines()
    return [int(json.loads(line)["global_step/max_steps"].split("/")[0]) for line in lines]


def start(argv: list[str]) -> Any:
    """A process that runs `megatron sft`, forked with everything imported."""
    context = fork_context()
    port = free_port()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=rank_main, args=(theirs, 0, 1, port, command, ("sft", argv)))
    process.start()
    theirs.close()
    return process, ours


def wait_for_a_step(process: Any, save: Path) -> None:
    """Until the run has made a step, or has ended: kills before that would prove little."""
    log = save / "logging.jsonl"
    before = log.stat().st_size if log.is_file() else 0
    while process.is_alive() and (log.stat().st_size if log.is_file() else 0) == before:
        time.sleep(0.005)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_run_killed_at_random_moments_ends_like_an_undisturbed_one(
    work: Path, tmp_path: Path, mode: str
) -> None:
    """Set KILLS=30 for the long form."""
    changes = {"async_save": "true"} if mode == "async" else {}
    last = {"save_safetensors": "true", "train_iters": STEPS + 1}
    run("sft", 1, flags(work, tmp_path / "whole", **changes))
    run("sft", 1, flags(work, tmp_path / "whole", **last))
    expected = load_file(tmp_path / "whole" / f"iter_{STEPS + 1:07d}-hf" / "model.safetensors")
    chance = random.Random(7)
    kills, inside, campaign = 0, 0, 0
    while kills < KILLS:
        campaign += 1
        save = tmp_path / f"killed-{campaign}"
        while True:
            process, pipe = start(flags(work, save, **changes))
            if kills < KILLS:
                wait_for_a_step(process, save)
            process.join(chance.uniform(0, 0.8) if kills < KILLS else None)
            alive = process.is_alive()
            process.kill()
            process.join()
            if not alive:
                _, error = pipe.recv()
                assert error is None, error
                break
            kills += 1
            if (save / TRACKER).is_file():
                iteration = save / checkpoint.read_iteration(save)
                assert checkpoint.missing(iteration) is None
                assert checkpoint.damaged(iteration) is None
            whole = [
                checkpoint.missing(save / checkpoint.folder_name(n)) is None
                for n in checkpoint.iterations(save)
            ]
            inside += not all(whole)
        run("sft", 1, flags(work, save, **last))
        found = load_file(save / f"iter_{STEPS + 1:07d}-hf" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    print(f"{kills} kills in {campaign} runs, {inside} inside a save")


@pytest.mark.parametrize(
    ("file", "size"),
    [(r"iter_0000002/__0_0\.distcp$", 50_000), (r"iter_0000002/metadata\.json", 0)],
)
def test_run_killed_inside_a_save_keeps_the_one_before(
    work: Path, tmp_path: Path, file: str, size: int
) -> None:
    save = tmp_path / "save"
    argv = flags(work, save, train_iters=2)
    assert exit_codes(1, work_and_die, file, size, "sft", argv) == [-signal.SIGXFSZ]
    assert (save / TRACKER).read_text() == "1"
    assert checkpoint.damaged(save / "iter_0000001") is None
    path, fault, _ = checkpoint.examine("--load", str(save), 2)
    assert fault == "iter_0000002 is missing or incomplete"
    assert (path / "iter_0000002").is_dir()
    run("sft", 1, argv)
    assert set(log_steps(save)) == {1, 2}
    assert (save / TRACKER).read_text() == "2"
    assert checkpoint.missing(save / "iter_0000002") is None
    assert checkpoint.damaged(save / "iter_0000002") is None


def test_sigterm_saves_the_step_at_hand(work: Path, tmp_path: Path) -> None:
    """The launcher gets the signal, as from a scheduler; both ranks save and end."""
    save = tmp_path / "run"
    changes = {"train_iters": 5000, "save_interval": 5000, "exit_signal_handler": "true"}
    environ = os.environ | {"OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2"}
    argv = flags(work, save, tensor_model_parallel_size=2, lr_warmup_iters=0, **changes)
    job = subprocess.Popen(
        [sys.executable, "-m", "swiftmeg.cli.main", "megatron", "sft", *argv],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not ((save / "logging.jsonl").is_file() and len(log_steps(save)) >= 3):
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert time.monotonic() - sent < 30
    assert job.returncode == 128 + signal.SIGTERM, errors
    last = log_steps(save)[-1]
    assert checkpoint.read_iteration(save) == checkpoint.folder_name(last)
    assert checkpoint.missing(save / checkpoint.folder_name(last)) is None


@pytest.fixture(scope="module")
def saved(work: Path) -> Path:
    """A finished run that keeps the last two of its checkpoints."""
    folder = work / "saved"
    run("sft", 1, flags(work, folder, train_iters=4, save_total_limit=2))
    return folder


def test_save_total_limit_keeps_the_newest(saved: Path) -> None:
    assert checkpoint.iterations(saved) == [3, 4]
    assert (saved / TRACKER).read_text() == "4"


def flip_a_bit(iteration: Path) -> None:
    """Damage the largest entry of a checkpoint, in the middle; the length stays."""
    entries = read_index(iteration / INDEX).storage_data.values()
    entry = max(entries, key=lambda each: each.length)
    with (iteration / entry.relative_path).open("r+b") as file:
        file.seek(entry.offset + entry.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def cut_off(iteration: Path) -> None:
    (iteration / checkpoint.LAST_FILE).unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off])
def test_resume_falls_back_to_the_last_good_one_and_says_so(
    work: Path, saved: Path, tmp_path: Path, damage: Any
) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    damage(folder / "iter_0000004")
    output = tmp_path / "output"
    run_ranks(2, train_into, flags(work, folder, train_iters=4, save_total_limit=2), output)
    assert log_steps(folder)[4:] == [4], "it does not continue behind step 3"
    warning = r"warning: --load .*iter_0000004.*: continuing from iter_0000003 instead"
    assert [line for line in output.read_text().splitlines() if re.match(warning, line)]
    assert checkpoint.damaged(folder / "iter_0000004") is None
    assert checkpoint.iterations(folder) == [3, 4]


def test_damage_without_a_way_back_ends_in_one_line(
    work: Path, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(folder / "iter_0000003")
    flip_a_bit(folder / "iter_0000004")
    with pytest.raises(RuntimeError, match=r"UserError: --load .*distcp is damaged: bytes \d+ to"):
        run("sft", 1, flags(work, folder, train_iters=5))
    missing_too = flags(work, folder, train_iters=5, ckpt_step=2)
    with pytest.raises(RuntimeError, match=r"UserError: .*iter_0000002 is missing or incomplete"):
        run("sft", 1, missing_too)


def test_room_is_made_without_a_moment_of_a_broken_tracker(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    checkpoint.make_room(folder, 4)
    assert (folder / TRACKER).read_text() == "3"
    assert checkpoint.iterations(folder) == [3]
    checkpoint.make_room(folder, 3)
    assert not (folder / TRACKER).exists()
    assert checkpoint.is_empty(str(folder))
