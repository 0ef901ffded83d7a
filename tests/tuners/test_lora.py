"""LoRA is what PEFT computes on the Hugging Face model; tests/matrix/ compares layouts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.matrix.lora import beside
from tests.matrix.lora import write as write_adapters
from tests.ranks import run_ranks
from tests.references import relative, transformers_loss
from tests.runs import SEQUENCE, export, logged, run
from tests.tuners.lora_runs import (
    MODELS,
    TUNERS,
    adapters,
    distance,
    flags,
    train,
    write_inputs,
)

PLUS: dict[str, Any] = {"lorap_lr_ratio": 4, "lr_decay_style": "cosine", "min_lr": 5e-4}
"""LoRA+ over a schedule."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("lora"), MODELS)


def train_and_keep_start(argv: list[str], start: str) -> None:
    """`megatron sft` on one rank, which also writes the adapters from before its first step."""
    from swiftmeg.args.commands import SftArguments
    from swiftmeg.args.read import read_training_arguments
    from swiftmeg.observer import Observer
    from swiftmeg.trainers.methods import METHODS
    from swiftmeg.trainers.run import train

    args, sources, model = read_training_arguments(SftArguments, argv, "megatron sft")

    class Start(Observer):
        def built(self, models: list[Any], optimizer: Any) -> None:
            write_adapters(args, model, models, Path(start))

    train(args, sources, model, METHODS["sft"], [Start()])


def adam_of(peft: Any, plus: bool) -> torch.optim.Optimizer:
    """AdamW over what PEFT's model trains, with PEFT's own groups for LoRA+."""
    from peft.optimizers import create_loraplus_optimizer

    options: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-3}
    if plus:
        return create_loraplus_optimizer(
            peft, torch.optim.AdamW, loraplus_lr_ratio=4, loraplus_weight_decay=0.01, **options
        )
    trained = [p for p in peft.parameters() if p.requires_grad]
    groups = [{"params": [p], "weight_decay": 0.0 if p.dim() == 1 else 0.01} for p in trained]
    return torch.optim.AdamW(groups, **options)


@pytest.mark.parametrize(
    ("model", "changes"), [*((model, {}) for model in MODELS), ("biased", PLUS)]
)
def test_ten_steps_are_those_of_peft(work: Path, model: str, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    name = f"{model}-plus" if changes else model
    start = work / f"{name}-start"
    argv = flags(work, model, work / f"{name}-alone", TUNERS[model] | changes)
    run_ranks(1, train_and_keep_start, argv, str(start))
    base = AutoModelForCausalLM.from_pretrained(work / model, dtype=torch.float32)
    peft = beside(base, start)
    if model == "tied":
        assert peft.peft_config["default"].lora_alpha == 6
    trained = [p for p in peft.parameters() if p.requires_grad]
    adam = adam_of(peft, bool(changes))
    peaks = [group["lr"] for group in adam.param_groups]
    lines = logged(work / f"{name}-alone")
    assert lines[-1]["lm loss"] < 0.9 * lines[0]["lm loss"]
    rate = 2e-3
    for line in lines:
        loss = transformers_loss(peft, work / model)
        assert relative(line["lm loss"], loss.item()) <= 1e-4
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        assert relative(line["grad_norm"], norm.item()) <= 1e-4
        for group, peak in zip(adam.param_groups, peaks, strict=True):
            group["lr"] = peak * rate / 2e-3
        adam.step()
        adam.zero_grad()
        rate = line["learning_rate"]  # of the next step
    peft.save_pretrained(work / f"{name}-peft", save_embedding_layers=False)
    ours = adapters(work, f"{name}-alone")
    assert distance(ours, load_file(work / f"{name}-peft" / "adapter_model.safetensors")) <= 1e-4


def test_a_run_continues_exactly_and_stores_no_weight_of_the_model(work: Path) -> None:
    """With dropout, in the middle of an epoch; the base comes from a Megatron checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    export(work / "base", to_mcore="true", model=work / "biased")
    options: dict[str, Any] = {"lora_dropout": 0.1, "save_interval": 2, "global_batch_size": 8}
    options |= SEQUENCE | {"train_iters": 4, "load": work / "base"} | PLUS
    whole = train(work, "biased", "whole", 2, **options)
    entries = FileSystemReader(work / "whole" / "iter_0000002").read_metadata().state_dict_metadata
    weights = {name for name in entries if not name.startswith(("optimizer.", "rng_state"))}
    assert all("lora_" in name for name in weights if name.endswith("weight"))
    assert len([name for name in weights if name.endswith("weight")]) == 4 * 4 * 2
    moments = [name for name in entries if name.startswith("optimizer.state.exp_avg.")]
    assert len(moments) == 4 * 4 * 2
    base = sum(path.stat().st_size for path in (work / "base").rglob("*.distcp"))
    ours = sum(path.stat().st_size for path in (work / "whole/iter_0000002").rglob("*.distcp"))
    assert ours < base
    for known in ("load", "lora_dropout", "lorap_lr_ratio"):
        del options[known]  # the checkpoint's args.json knows them
    rest = train(work, "biased", "rest", 2, adapter_load=work / "whole", ckpt_step=2, **options)
    exact = ("lm loss", "grad_norm", "learning_rate", "consumed_samples", "global_step/max_steps")
    assert [{k: line[k] for k in exact} for line in rest] == [
        {k: line[k] for k in exact} for line in whole[2:]
    ]
    first, second = adapters(work, "whole", 4), adapters(work, "rest", 4)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_experts_with_biases_are_refused(tmp_path: Path) -> None:
    work = write_inputs(tmp_path, {"gpt_oss": ("gpt_oss", {"num_local_experts": 4})})
    with pytest.raises(RuntimeError, match="--target_modules linear_qkv linear_proj"):
        run("sft", 1, flags(work, "gpt_oss", work / "refused", {}))
    explicit = {"target_modules": ["linear_qkv", "linear_proj"], "train_iters": 1}
    run("sft", 1, flags(work, "gpt_oss", work / "attention", explicit))
