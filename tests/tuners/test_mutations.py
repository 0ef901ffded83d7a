"""What LoRA gets wrong elsewhere is seen here: each mistake, made on purpose, changes the run."""

from pathlib import Path
from typing import Any

import pytest

from tests.layouts.test_training import relative, run_training
from tests.ranks import run_ranks
from tests.tuners.lora_runs import SEQUENCE, TENSOR, flags, log, train, words, write_inputs
from tests.tuners.test_lora import EXPERT, MODELS, TUNERS

STEPS = 3
MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "no sum of a replicated factor over positions": ("tied", SEQUENCE),
    "no sum of a replicated factor over shards": ("tied", TENSOR),
    "a start for each shard": ("tied", SEQUENCE),
    "one adapter for a rank's experts": ("moe", EXPERT),
}


def make(mistake: str) -> None:
    """Break this process's LoRA."""
    from swiftmeg.tuners import adapters, experts, layers

    def cut(values: Any, factor: Any, adapter: Any) -> Any:
        if factor.axis is None:
            return values
        size, axis = adapter.group.size(), factor.axis - factor.weight.dim()
        return values.chunk(size, dim=axis)[0] * size**0.5

    def product(self: Any, x: Any, factor: Any, rows: Any) -> Any:
        first = [factor.weight[0]] * len(factor.weight)
        return experts.grouped_product(x, first, list(rows), False)

    if mistake == "no sum of a replicated factor over positions":
        layers.Factor.sum_over_positions = lambda self: None
    elif mistake == "no sum of a replicated factor over shards":
        layers.copy_to_tensor_model_parallel_region = lambda x, group: x
    elif mistake == "a start for each shard":
        adapters.cut = cut
    else:
        experts.ExpertAdapter.product = product


def train_with(mistake: str, argv: list[str]) -> None:
    make(mistake)
    run_training(argv)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = {name: MODELS[name] for name in ("tied", "moe")}
    folder = write_inputs(tmp_path_factory.mktemp("mutations"), models)
    for model in models:
        train(folder, model, f"{model}-alone", train_iters=STEPS, **TUNERS[model])
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(work: Path, mistake: str) -> None:
    model, layout = MISTAKES[mistake]
    name = f"{model}-{list(MISTAKES).index(mistake)}"
    changes = {"train_iters": STEPS, "save_safetensors": "false", **TUNERS[model], **layout}
    run_ranks(2, train_with, mistake, flags(work, model, work / name, changes))
    pairs = zip(log(work, name), log(work, f"{model}-alone"), strict=True)
    differences = [
        relative(found[key], expected[key])
        for found, expected in pairs
        for key in ("lm loss", "grad_norm")
    ]
    assert max(differences) > 1e-4


def merge_without_scale(argv: list[str]) -> None:
    """`swift export` that adds B @ A as it is."""
    from swiftmeg.cli.export import main
    from swiftmeg.tuners import merge

    right = merge.merge

    def wrong(models: list[Any]) -> str:
        for each in merge.attached(models):
            each.adapter.scaling["default"] = 1.0
        return right(models)

    merge.merge = wrong
    main(argv)


def test_a_merge_without_the_scale_is_seen(work: Path) -> None:
    target = work / "merged"
    command = {
        "mcore_adapters": work / "tied-alone",
        "to_hf": "true",
        "output_dir": target,
        "test_convert_precision": "true",
    }
    with pytest.raises(RuntimeError, match="the merged model and the model with its adapters"):
        run_ranks(1, merge_without_scale, words(command))
    assert not target.exists()
