"""Published configurations at full size: every rank's parameters, every HF tensor, no weights."""

import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftmeg.models.hf import read_model
from tests.families.conversion import Layout, arguments
from tests.ranks import fork_context

CONFIGS = Path(__file__).parent / "configs"

# layout, layers on the first and the last pipeline stage
LAYOUTS: dict[str, tuple[Layout, int | None, int | None]] = {
    "Llama-3.1-405B": (Layout(128, tensor=8, pipeline=16), 7, 7),
    "Qwen3-30B-A3B": (Layout(16, tensor=2, pipeline=2, expert=4, expert_tensor=2), None, None),
    "Qwen3-Next-80B-A3B": (Layout(16, tensor=2, pipeline=2, expert=8, expert_tensor=1), 23, None),
    "Qwen3-235B-A22B": (Layout(64, tensor=4, pipeline=8, expert=8, expert_tensor=1), 11, 11),
    "GLM-4.5": (Layout(128, tensor=4, pipeline=8, expert=16, expert_tensor=1), 10, 10),
    "DeepSeek-V3": (Layout(128, tensor=2, pipeline=8, expert=16, expert_tensor=1), 7, 6),
    "Kimi-K2": (Layout(128, tensor=2, pipeline=8, expert=16, expert_tensor=1), 7, 6),
}

Shapes = dict[str, tuple[int, ...]]


def hf_shapes(hf_config: Any) -> Shapes:
    """Name and shape of every tensor of transformers' model, one tensor an expert."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    shapes: Shapes = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        for stacked, names in (
            ("gate_up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        ):
            if name.endswith(f"experts.{stacked}"):
                count, rows, columns = shape
                for expert in range(count):
                    for part in names:
                        place = name.removesuffix(stacked) + f"{expert}.{part}.weight"
                        shapes[place] = (rows // len(names), columns)
                break
        else:
            shapes[name] = shape
    return shapes


def survey(folder: str, layout: Layout, first: int | None, last: int | None) -> dict[str, Any]:
    """Build every rank; returns HF shapes made of each parameter, and who holds which shard."""
    from swiftmeg import platform

    platform.prepare()
    os.environ |= {
        "WORLD_SIZE": str(layout.world),
        "RANK": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    from swiftmeg.export.hf_writer import hf_tensors_of
    from swiftmeg.export.model import conversion_namespace
    from swiftmeg.export.shards import live_weights
    from swiftmeg.models.build import dims_of
    from swiftmeg.models.meta import build_chunks, describe, seat

    model = read_model(folder)
    object.__setattr__(model, "mtp_num_layers", 0)
    args = arguments(layout, "bfloat16")
    args.decoder_first_pipeline_num_layers = first
    args.decoder_last_pipeline_num_layers = last
    namespace = conversion_namespace(args, model)
    plan = {row.mcore: row for row in model.family.plan(model.config)}
    made: Shapes = {}
    holders: dict[str, set[tuple[int, int]]] = defaultdict(set)
    config = describe(namespace, model.hf_config)
    for rank in range(layout.world):
        with seat(namespace, rank) as groups:
            seen = set()
            for live in live_weights(build_chunks(config, groups)):
                assert live.name not in seen, f"{live.name} twice on rank {rank}"
                seen.add(live.name)
                holders[live.name].add((live.rank if live.pieces > 1 else 0, live.pieces))
                if live.name not in made:
                    infos = hf_tensors_of(live, plan[live.name], dims_of(namespace), torch.bfloat16)
                    made |= {info.name: info.shape for info in infos}
                    made[live.name] = ()
    parameters = {name for name, shape in made.items() if shape == ()}
    return {
        "planned": [name for row in plan.values() for name in row.hf],
        "made": {name: shape for name, shape in made.items() if name not in parameters},
        "unplanned": parameters ^ plan.keys(),
        "torn": [n for n, held in holders.items() if len(held) != next(iter(held))[1]],
        "expected": hf_shapes(model.hf_config),
    }


@pytest.fixture(scope="module")
def surveys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All configurations, two at a time."""
    root = tmp_path_factory.mktemp("full-size")
    for name in LAYOUTS:
        (root / name).mkdir()
        shutil.copyfile(CONFIGS / f"{name}.json", root / name / "config.json")
    with fork_context().Pool(2, maxtasksperchild=1) as pool:
        jobs = {
            name: pool.apply_async(survey, (str(root / name), *LAYOUTS[name]))
            for name in sorted(LAYOUTS, key=lambda name: -LAYOUTS[name][0].world)
        }
        return {name: job.get(timeout=600) for name, job in jobs.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_and_every_parameter_once(surveys: dict[str, Any], name: str) -> None:
    found = surveys[name]
    assert not found["unplanned"]
    assert not found["torn"]
    assert len(found["planned"]) == len(set(found["planned"]))
    assert set(found["planned"]) == found["expected"].keys()
    assert found["made"] == found["expected"]


def test_the_configurations_are_the_published_ones(surveys: dict[str, Any]) -> None:
    """Parameters as their publishers count them, in billions."""
    published = {
        "DeepSeek-V3": 671,
        "Qwen3-235B-A22B": 235,
        "Qwen3-Next-80B-A3B": 80,
        "Llama-3.1-405B": 406,
        "GLM-4.5": 353,
    }
    for name, billions in published.items():
        shapes = surveys[name]["expected"].values()
        assert round(sum(torch.Size(shape).numel() for shape in shapes) / 1e9) == billions, name
