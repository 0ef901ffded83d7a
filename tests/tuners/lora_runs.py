"""LoRA runs on tiny models, and what they leave."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.references import write_rows
from tests.runs import logged, run, training
from tests.sizes import BIASED, EXPERTS, GROUPED
from tests.tiny import save_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "biased": ("llama", BIASED),
    "tied": ("qwen3", GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "moe": EXPERTS["qwen2_moe"],
    "mla": EXPERTS["deepseek_v3"],
}
TUNERS: dict[str, dict[str, Any]] = {
    "biased": {
        "target_modules": ["all-linear", "all-embedding", "output_layer"],
        "lora_bias": "all",
        "use_rslora": "true",
    },
    "tied": {
        "target_regex": r"decoder\.layers\.[0-2]\..*(linear_qkv|linear_proj|fc2)",
        "modules_to_save": ["word_embeddings", "pre_mlp_layernorm"],
        "lora_alpha": 6,
    },
    "moe": {"target_modules": ["all-linear", "all-router"]},
    "mla": {"target_modules": ["all-linear"], "modules_to_save": ["router", "output_layer"]},
}


def write_inputs(folder: Path, models: dict[str, tuple[str, dict[str, Any]]]) -> Path:
    """Rows, and a model under each name: its family and sizes."""
    for name, (family, sizes) in models.items():
        save_model(folder / name, family, **sizes)
    write_rows(folder)
    return folder


def flags(work: Path, model: str, save: Path, changes: dict[str, Any]) -> list[str]:
    """`megatron sft` with LoRA for ten steps over all 20 rows."""
    settings = {
        "train_type": "lora",
        "lora_rank": 4,
        "lora_dropout": 0,
        "train_iters": 10,
        "global_batch_size": 20,
        "lr": 2e-3,
        "weight_decay": 0.01,
        "lr_decay_style": "constant",
        "adam_eps": 1e-3,  # rounding of gradients near zero does not turn updates around
        "save_safetensors": "true",
    }
    if "adapter_load" in changes:
        del settings["lora_dropout"], settings["lora_rank"]
    return training(work, save, model, **settings | changes)


def train(
    work: Path, model: str, name: str, world: int = 1, **changes: Any
) -> list[dict[str, Any]]:
    """Run it; returns the lines of logging.jsonl."""
    run("sft", world, flags(work, model, work / name, changes))
    return logged(work / name)


def adapters(work: Path, name: str, step: int = 10) -> dict[str, torch.Tensor]:
    """The tensors of the PEFT folder that a run wrote."""
    return load_file(work / name / f"iter_{step:07d}-hf" / "adapter_model.safetensors")


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()
    )
