"""Training does not depend on the layout, and its first step is what transformers computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.tiny import save_model

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "hidden_size": 64,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = TENSOR | {"sequence_parallel": "true"}
PIPELINE = {"pipeline_model_parallel_size": 2}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batch-4": (1, {"micro_batch_size": 4}),
    "padded": (1, {"micro_batch_size": 4, "padding_free": "false"}),
    "full-recompute": (
        1,
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "dp2": (2, {}),
    "dp2-overlap": (2, {"overlap_grad_reduce": "true", "overlap_param_gather": "true"}),
    "tp2": (2, TENSOR),
    "tp2-sp": (2, SEQUENCE | {"micro_batch_size": 2}),
    "tp2-sp-padded": (2, SEQUENCE | {"micro_batch_size": 2, "padding_free": "false"}),
    "pp2": (2, PIPELINE | {"micro_batch_size": 2}),
    "pp2-uneven": (2, PIPELINE | {"decoder_first_pipeline_num_layers": 1}),
    "tp2-pp2": (4, TENSOR | PIPELINE),
    "tp2-sp-pp2-dp2": (8, SEQUENCE | PIPELINE),
}


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations of very different lengths, some of two turns."""
    made = []
    for i in range(count):
        turns = [{"role": "user", "content": f"question {i} " + "x" * (7 * i % 40)}]
        turns.append({"role": "assistant", "content": "yes " * (1 + 5 * i % 13)})
        if i % 3 == 0:
            turns += [
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": f"{i}."},
            ]
        made.append({"messages": turns})
    return made


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    for family, sizes in SIZES.items():
        save_model(folder / family, family, **sizes)
    lines = [json.dumps(row) for row in rows(20)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def run_training(argv: list[str]) -> None:
    """`megatron sft` inside an existing job."""
    from swiftmeg.args.commands import SftArguments
    from swiftmeg.args.training import read_training_arguments
    from swiftmeg.trainers.run import train

    train(*read_training_arguments(SftArguments, argv, "megatron sft"))


def train_steps(
    work: Path, family: str, name: str, world: int, flags: dict[str, Any]
) -> list[dict[str, Any]]:
    """Train a family's tiny model in a layout; returns the lines of logging.jsonl."""
    settings = {
        "model": work / family,
        "dataset": work / "rows.jsonl",
        "train_iters": 10,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "lr": 1e-3,
        "log_interval": 1,
        "num_workers": 0,
        "save": work / f"{family}-{name}",
        "add_version": "false",
        "no_save_optim": "true",
    } | flags
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    run_ranks(world, run_training, argv)
    log = Path(settings["save"]) / "logging.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


_references: dict[str, list[dict[str, Any]]] = {}


def reference(work: Path, family: str) -> list[dict[str, Any]]:
    """Ten steps of one process with micro-batches of one sample."""
    if family not in _references:
        _references[family] = train_steps(work, family, "reference", 1, {})
    return _references[family]


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", SIZES)
def test_every_layout_trains_alike(work: Path, family: str, layout: str) -> None:
    expected = reference(work, family)
    world, flags = LAYOUTS[layout]
    found = train_steps(work, family, layout, world, flags)
    assert len(expected) == len(found) == 10
    first, last = expected[0], expected[-1]
    assert last["lm loss"] < 0.9 * first["lm loss"], "the reference does not learn"
    assert relative(found[0]["lm loss"], first["lm loss"]) <= 1e-6
    assert relative(found[0]["grad_norm"], first["grad_norm"]) <= 1e-5
    assert relative(found[-1]["lm loss"], last["lm loss"]) <= 1e-4
    assert relative(found[-1]["grad_norm"], last["grad_norm"]) <= 1e-3


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def transformers_loss(model: Any, folder: Path, **template_options: Any) -> torch.Tensor:
    """Mean loss per trained token over all rows, one row at a time."""
    from transformers import AutoTokenizer

    from swiftmeg.data.template import Template

    template = Template(AutoTokenizer.from_pretrained(folder), **template_options)
    total, count = torch.zeros(()), 0
    for row in rows(20):
        encoded = template.encode(row)
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(encoded["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("layout", ["one process", "tp2-sp", "pp2", "dp2"])
@pytest.mark.parametrize("family", SIZES)
def test_first_step_is_that_of_transformers(work: Path, family: str, layout: str) -> None:
    from transformers import AutoModelForCausalLM

    lr = 64.0
    world, flags = LAYOUTS.get(layout, (1, {}))
    plain_sgd = {
        "optimizer": "sgd",
        "sgd_momentum": 0,
        "lr": lr,
        "min_lr": lr,
        "lr_decay_style": "constant",
        "weight_decay": 0,
        "clip_grad": 0,
        "use_distributed_optimizer": "false",
        "train_iters": 1,
        "global_batch_size": 20,
        "save_safetensors": "true",
    }
    name = f"gradient-{layout.replace(' ', '-')}"
    (line,) = train_steps(work, family, name, world, flags | plain_sgd | {"micro_batch_size": 1})
    before = load_folder(work / family)
    after = load_folder(work / f"{family}-{name}" / "iter_0000001-hf")

    model = AutoModelForCausalLM.from_pretrained(work / family, dtype=torch.float32)
    loss = transformers_loss(model, work / family)
    loss.backward()
    assert relative(line["lm loss"], loss.item()) <= 1e-5
    gradients = dict(model.named_parameters())
    for key, old in before.items():
        gradient = gradients[key].grad
        assert gradient is not None, key
        assert gradient.norm() > 0, key
        found = (old - after[key]) / lr
        assert (found - gradient).norm() / gradient.norm() <= 1e-5, key


FROZEN = {"lr": 0, "train_iters": 1, "global_batch_size": 10, "no_save_rng": "true"}


@pytest.mark.parametrize("layout", ["one process", "tp2-sp", "pp2", "dp2"])
def test_evaluation_is_the_loss_over_all_rows(work: Path, layout: str) -> None:
    """20 rows in global batches of 8: the last one is filled up, and that must not show."""
    from transformers import AutoModelForCausalLM

    world, flags = LAYOUTS.get(layout, (1, {}))
    flags = flags | FROZEN | {"val_dataset": work / "rows.jsonl", "global_batch_size": 8}
    lines = train_steps(work, "qwen3", f"eval-{layout.replace(' ', '-')}", world, flags)
    model = AutoModelForCausalLM.from_pretrained(work / "qwen3", dtype=torch.float32)
    with torch.no_grad():
        expected = transformers_loss(model, work / "qwen3").item()
    assert relative(lines[-1]["eval_lm loss"], expected) <= 1e-5


def test_packed_samples_do_not_see_each_other(work: Path) -> None:
    """All rows in one step, packed or not, give one loss and one gradient."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from swiftmeg.data.packing import pack
    from swiftmeg.data.template import Template

    template = Template(AutoTokenizer.from_pretrained(work / "qwen3"))
    encoded = Dataset.from_list([template.encode(row) for row in rows(20)])
    packs = pack([len(ids) for ids in encoded["input_ids"]], 256)
    assert 2 <= len(packs) < 20
    plain = train_steps(work, "qwen3", "unpacked", 1, FROZEN | {"global_batch_size": 20})
    packing = {"packing": "true", "max_length": 256, "global_batch_size": len(packs)}
    packed = train_steps(work, "qwen3", "packed", 1, FROZEN | packing)
    assert relative(packed[0]["lm loss"], plain[0]["lm loss"]) <= 1e-6
    assert relative(packed[0]["grad_norm"], plain[0]["grad_norm"]) <= 1e-6


def test_pt_trains_on_every_token(work: Path) -> None:
    from transformers import AutoModelForCausalLM

    flags = FROZEN | {"use_chat_template": "false", "loss_scale": "all", "global_batch_size": 20}
    (line,) = train_steps(work, "qwen3", "pt", 1, flags)
    model = AutoModelForCausalLM.from_pretrained(work / "qwen3", dtype=torch.float32)
    options = {"use_chat_template": False, "loss_scale": "all"}
    with torch.no_grad():
        expected = transformers_loss(model, work / "qwen3", **options).item()
    assert relative(line["lm loss"], expected) <= 1e-5
