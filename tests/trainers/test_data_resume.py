"""A run that is continued, on as many data-parallel ranks or others, sees the rows it would have.

Every row has a loss of its own, so equal losses mean equal samples.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftmeg.claim import LOCK
from tests.runs import logged, training
from tests.runs import run as start
from tests.tiny import save_model

STEPS = 7
SAVED = 3

MODES: dict[str, dict[str, Any]] = {
    "packed": {"packing": "true", "max_length": 128},
    "streaming": {"streaming": "true"},
    "streaming-packed-epochs": {"streaming": "true", "packing": "true", "max_length": 128}
    | {"max_epochs": 5, "train_iters": 99},
}
"""Where --max_epochs ends the run, it does so in fewer than 99 steps on every rank."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and 30 rows of which some are broken: the runs go through them twice and more."""
    folder = tmp_path_factory.mktemp("data-resume")
    save_model(folder / "model", "llama", num_hidden_layers=1)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(30):
            ask = {"role": "user", "content": f"question {i} " + "x" * (7 * i % 20)}
            answer = {"role": "assistant", "content": "yes " * (1 + 5 * i % 7)}
            file.write("broken\n" if i % 8 == 0 else json.dumps({"messages": [ask, answer]}) + "\n")
    return folder


def run(work: Path, save: str, world: int, **changes: Any) -> dict[str, dict[str, float]]:
    """Train; returns the lines of logging.jsonl by step."""
    settings = {
        "train_iters": STEPS,
        "lr_decay_iters": STEPS,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "shuffle_buffer_size": 1000,
        "save_interval": STEPS,
        "num_workers": 2,
        "save_safetensors": "false",
    } | changes
    start("sft", world, training(work, work / save, **settings))
    records = logged(work / save)
    return {record["global_step/max_steps"].split("/")[0]: record for record in records}


@pytest.fixture(scope="module")
def half(work: Path) -> Callable[[str], dict[str, dict[str, float]]]:
    """half(mode): what two ranks log that train the first steps and save them."""

    @functools.cache
    def train_half(mode: str) -> dict[str, dict[str, float]]:
        stop: dict[str, Any] = {"train_iters": SAVED, "save_interval": SAVED}
        return run(work, f"{mode}-half", 2, **MODES[mode] | stop)

    return train_half


@pytest.mark.parametrize("mode", MODES)
def test_continued_runs_see_the_same_samples(
    work: Path, half: Callable[[str], dict[str, dict[str, float]]], mode: str
) -> None:
    flags = MODES[mode]
    whole = run(work, f"{mode}-whole", 1, **flags)
    steps = len(whole) if "max_epochs" in flags else STEPS
    assert len({record["lm loss"] for record in whole.values()}) == steps
    assert SAVED < steps < 99
    found = {1: half(mode)}
    for world in (1, 2):
        load = {"load": work / f"{mode}-half"}
        found[world + 1] = run(work, f"{mode}-{world}", world, **load, **flags)
        assert list(found[world + 1]) == [str(step) for step in range(SAVED + 1, steps + 1)]
        assert (work / f"{mode}-{world}" / f"iter_{steps:07d}").is_dir()
    for records in found.values():
        for step, record in records.items():
            for key in ("lm loss", "consumed_samples"):
                assert record[key] == pytest.approx(whole[step][key], rel=1e-5), step


def test_a_stream_that_ends_early_says_so(work: Path) -> None:
    flags = {"streaming": "true", "max_epochs": 1, "train_iters": 99}
    with pytest.raises(
        RuntimeError, match=r"ends before one .*26 samples; dropped rows: 4 x not J"
    ):
        run(work, "short", 2, global_batch_size=64, **flags)
    # What the launcher of a command would clear away is all there is.
    assert [path.name for path in (work / "short").iterdir()] == [LOCK]
    made = run(work, "ended", 2, global_batch_size=8, **flags)
    assert list(made) == ["1", "2", "3"]
    again = run(work, "ended", 1, global_batch_size=8, load=work / "ended", **flags)
    assert list(again) == list(made)
    more = run(
        work, "ended", 1, global_batch_size=8, load=work / "ended", **flags | {"max_epochs": 2}
    )
    assert list(more)[:4] == ["1", "2", "3", "4"]
    assert len(more) in (5, 6)


def test_a_stream_is_not_continued_as_another(
    work: Path, half: Callable[[str], dict[str, dict[str, float]]]
) -> None:
    half("streaming")
    half("packed")
    again = {"load": work / "streaming-half", **MODES["streaming"]}
    with pytest.raises(
        RuntimeError, match="--streaming true: the checkpoint's run read other data"
    ):
        run(work, "other", 1, data_seed=7, **again)
    with pytest.raises(RuntimeError, match=r"--global_batch_size 8: .* was dealt out for 4"):
        run(work, "other", 1, global_batch_size=8, **again)
    with pytest.raises(RuntimeError, match="the checkpoint's run did not read a stream"):
        run(work, "other", 1, **again | {"load": work / "packed-half"})
