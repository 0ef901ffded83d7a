"""`megatron rlhf --rlhf_type dpo` against TRL, and its stored reference against a live one."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.matrix.harness import Keeper
from tests.ranks import run_ranks
from tests.runs import PIPELINE, Flags, load_folder, logged, training
from tests.tiny import save_model
from tests.trainers.make_dpo_reference import (
    BATCH,
    CASES,
    EPSILON,
    LR,
    MAX_LENGTH,
    STEPS,
    projection,
    rows,
    save_models,
)
from tests.trainers.test_dpo_trl import REFERENCE, flags

QUICK = ("mpo", "aot smoothed", "ld_alpha", "use_weighting")
"""Cases that go other ways than the rest, whose losses test_dpo_trl.py compares."""

STEP: Flags = {
    "dataset_shuffle": "false",
    "train_iters": STEPS,
    "global_batch_size": BATCH,
    "lr": LR,
    "lr_decay_style": "constant",
    "adam_eps": EPSILON,
    "adam_beta2": 0.999,
    "weight_decay": 0,
    "clip_grad": 0,
    "max_length": MAX_LENGTH,
    "strict": "true",
}


def train_pairs(argv: list[str], out: str, cache: str) -> None:
    """`megatron rlhf` on one rank, with gradients and weights written to `out`."""
    os.environ["SWIFTMEG_CACHE"] = cache
    from swiftmeg.args.commands import RlhfArguments
    from swiftmeg.args.read import read_training_arguments
    from swiftmeg.trainers.methods import METHODS
    from swiftmeg.trainers.run import train

    args, sources, model = read_training_arguments(RlhfArguments, argv, "megatron rlhf")
    train(args, sources, model, METHODS["dpo"], [Keeper(args, model, Path(out))])


def run(work: Path, name: str, world: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """The lines that a run of pairs logs, once a step."""
    out = work / name
    cache = str(work / changes.pop("cache", "cache"))
    run_ranks(world, train_pairs, training(work, out / "run", **STEP | changes), str(out), cache)
    return [line for line in logged(out / "run") if "loss" in line]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    save_models(folder)
    save_model(folder / "other", "llama", hidden_size=96, num_hidden_layers=2)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.exhaustive) for n in CASES],
)
def test_training_is_that_of_trl(work: Path, name: str) -> None:
    words = flags(CASES[name])
    starts = [i for i, word in enumerate(words) if word.startswith("--")] + [len(words)]
    given = {words[a].removeprefix("--"): words[a + 1 : b] for a, b in itertools.pairwise(starts)}
    lines = run(work, name, ref_model=work / "reference", **given)
    expected = REFERENCE["cases"][name]
    found = [line["loss"] for line in lines]
    assert found[0] == pytest.approx(expected["losses"][0], rel=1e-5, abs=1e-6)
    assert found == pytest.approx(expected["losses"], rel=1e-4, abs=1e-4)
    for metric, value in expected["metrics"].items():
        assert lines[0][metric] == pytest.approx(value, rel=1e-5, abs=1e-5), metric
    for key, gradient in load_folder(work / name / "gradients").items():
        norm, product = expected["gradients"][key]
        assert gradient.double().norm().item() == pytest.approx(norm, rel=1e-5), key
        bound = 1e-5 * norm * gradient.numel() ** 0.5
        assert projection(gradient) == pytest.approx(product, abs=bound), key


CONTEXT: Flags = {"context_parallel_size": 2}
TWO: Flags = {"precompute_ref_batch_size": 2}
LORA: Flags = {"train_type": "lora", "lora_rank": 4, "lr": 3e-3}
LAYOUTS: dict[str, tuple[int, Flags]] = {
    "PP2 x CP2, another model": (4, PIPELINE | CONTEXT | {"ref_model": "reference"}),
    "DP2, packed": (2, {"packing": "true", "max_length": 256} | TWO),
    "padded": (1, {"padding_free": "false"} | TWO),
    "LoRA": (1, LORA | {"modules_to_save": "output_layer"}),
    "continued adapters": (2, LORA | {"adapters": "start"}),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n.startswith(("PP2", "cont")) else pytest.mark.exhaustive)
        for n in LAYOUTS
    ],
)
def test_a_stored_reference_is_the_live_one(work: Path, name: str) -> None:
    world, changes = LAYOUTS[name]
    changes = {key: work / value if key == "ref_model" else value for key, value in changes.items()}
    if changes.get("adapters"):
        run(work, "start-run", **LORA, train_iters=3, save_safetensors="true")
        changes["adapters"] = work / "start-run" / "run" / "iter_0000003-hf"
    short = {"train_iters": 4, "val_dataset": work / "rows.jsonl", "eval_interval": 2}
    live = {key: value for key, value in changes.items() if key != "precompute_ref_batch_size"}
    stored = run(work, f"{name}-stored", world, **short | changes)
    running = run(work, f"{name}-live", world, **short | live, precompute_ref_log_probs="false")
    for metric in ("loss", "rewards/margins", "rewards/chosen", "logps/rejected"):
        values = [[line[metric] for line in lines] for lines in (stored, running)]
        assert values[0] == pytest.approx(values[1], rel=1e-5, abs=2e-5), metric
    assert abs(running[-1]["rewards/margins"]) > 1e-3  # the reference is not the model itself
    folders = [work / f"{name}-{which}" / "run" for which in ("stored", "live")]
    evaluated = [next(line for line in logged(f) if "eval_loss" in line) for f in folders]
    for metric in ("eval_loss", "eval_rewards/margins"):
        assert evaluated[0][metric] == pytest.approx(evaluated[1][metric], rel=1e-5, abs=2e-5)


def numbers(cache: Path) -> Path:
    """The one file of a reference's numbers."""
    (file,) = (cache / "reference").glob("*/logps.bin")
    return file


def test_a_killed_pass_goes_on_and_a_continued_run_finds_its_numbers(work: Path) -> None:
    cache = work / "killed"
    whole = run(work, "whole", cache=cache, train_iters=2)
    first = numbers(cache)
    right = np.fromfile(first, dtype=np.float32)
    assert len(right) == 2 * len(rows())
    # Half of it is there, and one value tells that it was not measured again.
    half = np.where(np.arange(len(right)) < 6, right, np.nan).astype(np.float32)
    half[0] -= 5
    first.unlink()
    os.rmdir(first.parent)
    half.tofile(first.parent.with_name(f".{first.parent.name}.part"))
    changed = run(work, "begun", cache=cache, train_iters=2)
    found = np.fromfile(numbers(cache), dtype=np.float32)
    assert found[0] == right[0] - 5
    assert found[1:].tolist() == pytest.approx(right[1:].tolist(), rel=1e-6)
    rewards = [[line["rewards/margins"] for line in lines] for lines in (changed, whole)]
    assert rewards[0] != pytest.approx(rewards[1], abs=1e-3)
    # The continued run's model has moved on: only the stored numbers are those of its start.
    load = {"load": work / "begun" / "run", "train_iters": 3, "cache": cache}
    assert len(run(work, "more", **load)) == 1
    assert numbers(cache).read_bytes() == found.tobytes()
    numbers(cache).unlink()
    os.rmdir(first.parent)
    run(work, "again", **load)  # measured anew, with the weights that the first run began with
    anew = np.fromfile(numbers(cache), dtype=np.float32)
    assert anew.tolist() == pytest.approx(right.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"ref_model": "other"}, "is not a model like --model"),
        ({"ref_load": "nowhere"}, "--ref_load nowhere: "),
    ],
)
def test_a_reference_that_cannot_be_used_ends_the_run(
    work: Path, changes: Flags, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    with pytest.raises(RuntimeError, match=line):
        run(work, "refused", **changes)
