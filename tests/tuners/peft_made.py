"""Adapters that PEFT makes of tiny models, and what it computes with them again."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"vocab_size": 301}),
    "biased": ("qwen2", {"vocab_size": 301}),
    "tied": ("qwen3", {"vocab_size": 301, "tie_word_embeddings": True}),
    "moe": (
        "qwen2_moe",
        {
            "vocab_size": 301,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        },
    ),
}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(7, 47)[None]


def write_models(root: Path) -> None:
    """Each model in a folder of its name."""
    for name, (family, sizes) in MODELS.items():
        save_model(root / name, family, **SMALL | sizes)


def base_model(folder: Path, rows: int = 0) -> Any:
    """transformers' model with `rows` more rows in its tables, fewer if negative."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
    return model


def make(
    model: Path, folder: Path, rows: int = 0, save: dict[str, Any] | None = None, **config: Any
) -> Path:
    """Train an adapter, in a manner of speaking: random values are added to what would be."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = base_model(model, rows)
    with torch.no_grad():
        for table in (base.get_input_embeddings().weight, base.get_output_embeddings().weight):
            if rows > 0:
                table[-rows:] = torch.randn(rows, table.shape[1])
    peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **config))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    peft.save_pretrained(folder, **save or {})
    return folder


def reload(model: Path, folder: Path, rows: int = 0) -> Any:
    """PEFT's model of a folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base_model(model, rows), folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What a model computes."""
    found: torch.Tensor = model.eval()(IDS).logits
    return found


def merge(model: Path, folder: Path, target: Path) -> Path:
    """Write the merged model without Megatron; its files are the model's but for what changed."""
    from swiftmeg.export.hf_writer import copy_model_files
    from swiftmeg.models.hf import read_model
    from swiftmeg.tuners.merged_weights import MergedWeights
    from swiftmeg.tuners.peft_reader import read_adapters
    from swiftmeg.tuners.tables import settle_tables

    found = read_model(str(model))
    config, adapters = read_adapters(folder, found)
    settled = settle_tables(config, adapters, found)
    weights = MergedWeights(settled, config, adapters)
    tensors = {
        name: part.read().contiguous()
        for row in settled.family.plan(settled.config)
        for name, part in zip(row.hf, weights.parts(row), strict=True)
    }
    assert weights.merged.keys() == adapters.changed
    target.mkdir()
    copy_model_files(model, target, torch.float32, settled.overrides)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    """Say something else in adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Any) -> None:
    """Store what `change` makes of the tensors."""
    path = folder / "adapter_model.safetensors"
    changed = {
        name: tensor.clone().contiguous() for name, tensor in change(load_file(path)).items()
    }
    save_file(changed, path, {"format": "pt"})
