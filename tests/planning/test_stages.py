"""The planned ranks hold what the ranks of a real job hold, and together the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swiftmeg.args.commands import ExportArguments, SftArguments
from swiftmeg.args.read import read_command, read_training_arguments
from tests.planning.models import TINY, save_config
from tests.ranks import run_ranks

TENSOR = ["--tensor_model_parallel_size", "2"]
STAGES = ["--pipeline_model_parallel_size", "2"]
EXPERTS = ["--expert_model_parallel_size", "2"]
NO_ETP = ["--expert_tensor_parallel_size", "1"]

LAYOUTS = [
    ("qwen3", 4, [*TENSOR, *STAGES]),
    ("qwen3_moe", 4, [*TENSOR, *STAGES, *EXPERTS, *NO_ETP]),
    ("deepseek_v3", 4, [*STAGES, *EXPERTS]),
]


def real(folder: Path, layout: list[str]) -> dict[str, int]:
    """Sizes of this rank's parameters in a job."""
    from swiftmeg.export.model import build_model

    words = ["--model", str(folder), "--to_mcore", "true", *layout]
    args, _, model = read_command(
        ExportArguments, words, "swift export", "mcore_model", "mcore_adapters"
    )
    args.torch_dtype = "float32"
    _, models = build_model(args, model)
    return {name: each.numel() for chunk in models for name, each in chunk.named_parameters()}


def planned(folder: Path, world: int, layout: list[str]) -> Any:
    """The stages of a dry run, and the number of parameters that it states."""
    import os

    from swiftmeg import distributed
    from swiftmeg.planning import report, run, stages

    distributed.shut_down()
    os.environ["WORLD_SIZE"] = str(world)
    words = ["--model", str(folder), "--dry_run", "true", "--max_length", "64", *layout]
    words += [] if "--expert_model_parallel_size" not in layout else ["--sequence_parallel", "true"]
    args, _, model = read_training_arguments(SftArguments, words, "megatron sft")
    megatron = run.make_namespace(args, model, run.Sizes(64, 1))
    built = stages.build_stages(megatron, model.hf_config)
    assert not torch.distributed.is_initialized()
    return built, report.count_parameters(megatron, built)


@pytest.mark.parametrize(("name", "world", "layout"), LAYOUTS, ids=lambda case: str(case))
def test_ranks_hold_what_they_hold_in_a_job(
    name: str, world: int, layout: list[str], tmp_path: Path
) -> None:
    folder = save_config(tmp_path / name, TINY[name])
    ranks = run_ranks(world, real, folder, layout)
    ((stages, total),) = run_ranks(1, planned, folder, world, layout)
    for rank, parameters in enumerate(ranks):
        stage = stages[rank * len(stages) // world]
        assert {weight.name: weight.size for weight in stage.weights} == parameters
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(TINY[name])
    assert total == model.num_parameters()
