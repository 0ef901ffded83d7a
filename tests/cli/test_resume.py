"""Runs that are killed after a checkpoint and continued end as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.runs import command, run, training
from tests.tiny import save_model

STEPS = 6
SAVED = 2
TRACKER = "latest_checkpointed_iteration.txt"
EXACT = ("lm loss", "grad_norm", "learning_rate", "loss_scale", "consumed_samples")

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": "true"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and fewer rows than the runs need: a run goes through them twice and more."""
    folder = tmp_path_factory.mktemp("resume")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    save_model(folder / "model", "llama", num_hidden_layers=2, **sizes)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(20):
            ask = {"role": "user", "content": f"question {i} " + "x" * (7 * i % 20)}
            answer = {"role": "assistant", "content": "yes " * (1 + 5 * i % 7)}
            file.write(json.dumps({"messages": [ask, answer]}) + "\n")
    return folder


def flags(work: Path, save: Path, **changes: Any) -> list[str]:
    settings = {
        "train_iters": STEPS,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "lr_warmup_iters": 2,
        "save_interval": 2,
        "save_safetensors": "true",
    } | changes
    return training(work, save, **settings)


def run_and_kill(argv: list[str], save: Path, processes: int) -> None:
    """Start `megatron sft` and kill the process that was started once it has saved step SAVED."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        environ["NPROC_PER_NODE"] = str(processes)
    job = subprocess.Popen(
        [sys.executable, "-m", "swiftmeg.cli.main", "megatron", "sft", *argv],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        tracker = save / TRACKER
        while not (tracker.is_file() and tracker.read_text() == str(SAVED)):
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.01)
        ranks = psutil.Process(job.pid).children(recursive=True)
        assert len(ranks) >= (processes if processes > 1 else 0)
    finally:
        job.kill()
    job.communicate()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive, f"left behind: {alive}"
    assert tracker.read_text() == str(SAVED), "killed too late"


def steps(folder: Path, skip: int = 0) -> dict[str, dict[str, Any]]:
    """The lines of logging.jsonl behind the first `skip`, by step."""
    lines = (folder / "logging.jsonl").read_text().splitlines()[skip:]
    records = [json.loads(line) for line in lines]
    return {record["global_step/max_steps"]: record for record in records}


def resume(
    work: Path, folder: Path, target: Path, world: int, **changes: Any
) -> dict[str, dict[str, Any]]:
    """Continue the run in `folder`, writing to `target`; returns the steps that were made."""
    log = target / "logging.jsonl"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    run("sft", world, flags(work, target, load=folder, **changes))
    made = steps(target, before)
    assert list(made) == [f"{step}/{STEPS}" for step in range(SAVED + 1, STEPS + 1)]
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = (folder / f"iter_{STEPS:07d}-hf").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_exact(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    for step, record in found.items():
        assert {k: record[k] for k in EXACT} == {k: expected[step][k] for k in EXACT}, step


def check_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_killed_run_continues_in_its_folder(work: Path) -> None:
    """Dropout needs the random state; a save that was cut off is in the way."""
    whole, killed = work / "whole", work / "killed"
    run("sft", 1, flags(work, whole, **DROPOUT))
    expected = steps(whole)
    losses = [record["lm loss"] for record in expected.values()]
    assert losses[-1] < 0.9 * losses[0]
    run_and_kill(flags(work, killed, **DROPOUT), killed, 1)
    half = killed / "iter_0000004"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"cut off")
    check_exact(resume(work, killed, killed, 1, **DROPOUT), expected)
    check_weights(killed, whole)
    assert (killed / TRACKER).read_text() == str(STEPS)


def test_killed_job_continues_in_its_layout_and_in_another(work: Path) -> None:
    whole, killed = work / "whole-tp2", work / "killed-tp2"
    run("sft", 2, flags(work, whole, **TENSOR))
    expected = steps(whole)
    run_and_kill(flags(work, killed, **TENSOR), killed, 2)
    check_exact(resume(work, killed, work / "continued-tp2", 2, **TENSOR), expected)
    check_weights(work / "continued-tp2", whole)
    for world, name in ((1, "alone"), (2, "dp2")):
        found = resume(work, killed, work / f"continued-{name}", world)
        for step, record in found.items():
            for key in ("lm loss", "grad_norm"):
                assert record[key] == pytest.approx(expected[step][key], rel=1e-5), (name, step)
            for key in ("learning_rate", "consumed_samples"):
                assert record[key] == expected[step][key], (name, step)


@pytest.mark.parametrize(
    ("steps", "changes", "said"),
    [
        (6, {}, "--load run has made 6 steps and this run has 6: nothing is left to train"),
        (4, {}, "--load run has made 6 steps and this run has 4: nothing is left to train"),
        (7, {}, None),
        (6, {"ckpt_step": 3}, None),
        (6, {"finetune": True}, None),
    ],
)
def test_a_run_at_its_end_says_so(
    steps: int,
    changes: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from swiftmeg.trainers.checkpoints import nothing_left

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TRACKER).write_text("6")
    args = SimpleNamespace(continued="load", load="run", finetune=False, ckpt_step=None)
    vars(args).update(changes)
    warning = nothing_left(args, steps)
    assert (warning is None) == (said is None)
    assert (warning or "").startswith(said or "")


def test_run_that_changes_its_layout_at_every_stop_ends_like_one_process(work: Path) -> None:
    """TP 2 -> PP 2 -> DP 2 -> CP 2 -> TP 2, a step or two in each."""
    whole, moving = work / "whole-one", work / "moving"
    constant = {"lr_decay_style": "constant", "lr_warmup_iters": 0, "save_interval": 1}
    run("sft", 1, flags(work, whole, **constant))
    expected = steps(whole)
    layouts = [
        (1, TENSOR),
        (2, {"pipeline_model_parallel_size": 2}),
        (3, {}),
        (4, {"context_parallel_size": 2}),
        (STEPS, TENSOR),
    ]
    for until, layout in layouts:
        start = {"load": moving} if until > 1 else {}
        run("sft", 2, flags(work, moving, **constant | layout | start, train_iters=until))
    lines = [json.loads(line) for line in (moving / "logging.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    for found, record in zip(lines, expected.values(), strict=True):
        for key in ("lm loss", "grad_norm"):
            assert found[key] == pytest.approx(record[key], rel=1e-5), found
        for key in ("learning_rate", "consumed_samples"):
            assert found[key] == record[key]
    ours, theirs = weights(moving), weights(whole)
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_dropout_of_every_data_parallel_rank_continues(work: Path) -> None:
    """Ranks draw different numbers, because their rows differ in length."""
    whole, cut = work / "whole-dp2", work / "cut-dp2"
    constant = {"lr_decay_style": "constant", "lr_warmup_iters": 0}
    changes = DROPOUT | constant | {"deterministic_mode": "true"}
    run("sft", 2, flags(work, whole, **changes))
    run("sft", 2, flags(work, cut, **changes, train_iters=SAVED))
    check_exact(resume(work, cut, cut, 2, **changes), steps(whole))
    check_weights(cut, whole)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"cross_entropy_loss_fusion": "true"}, "--cross_entropy_loss_fusion"),
        ({"NCCL_ALGO": "Tree"}, "NCCL_ALGO='Tree'"),
    ],
)
def test_deterministic_mode_says_what_it_refuses(
    work: Path, changes: dict[str, Any], line: str
) -> None:
    environ = {name: changes.pop(name) for name in list(changes) if name.isupper()}
    argv = flags(work, work / "refused", deterministic_mode="true", **changes)
    with pytest.raises(RuntimeError, match=f"UserError: .*{line}"):
        run_ranks(1, train_with, argv, environ)


def train_with(argv: list[str], environ: dict[str, str]) -> None:
    """`train` with environment variables."""
    os.environ.update(environ)
    command("sft", argv)
