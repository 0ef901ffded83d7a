"""LoRA is the same in every layout, and what PEFT computes on the Hugging Face model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.layouts.test_experts import MODELS as EXPERTS
from tests.layouts.test_training import relative, transformers_loss
from tests.tuners.lora_runs import (
    PIPELINE,
    SEQUENCE,
    TENSOR,
    adapters,
    distance,
    log,
    train,
    write_inputs,
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "biased": (
        "llama",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "hidden_size": 64,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "tied": (
        "qwen3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
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
    },
    "moe": {"target_modules": ["all-linear", "all-router"]},
    "mla": {"target_modules": ["all-linear"], "modules_to_save": ["router", "output_layer"]},
}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
EXPERT = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "biased-tp2": (2, TENSOR | RECOMPUTE),
    "biased-tp2-sp-pp2": (4, SEQUENCE | PIPELINE),
    "tied-tp2-sp": (2, SEQUENCE),
    "tied-pp2-vpp2": (2, PIPELINE | {"virtual_pipeline_model_parallel_size": 2}),
    "tied-cp2-dp2": (4, {"context_parallel_size": 2}),
    "moe-ep2": (2, EXPERT),
    "moe-tp2-sp-ep2-etp1": (2, SEQUENCE | EXPERT | {"expert_tensor_parallel_size": 1}),
    "moe-tp2-sp-etp2": (2, SEQUENCE),
    "mla-ep2-pp2": (4, EXPERT | PIPELINE | {"decoder_first_pipeline_num_layers": 1}),
    "mla-tp2-sp-etp2": (2, SEQUENCE),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("lora"), MODELS)
    for model, tuner in TUNERS.items():
        train(folder, model, f"{model}-alone", **tuner)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_alike(work: Path, layout: str) -> None:
    model = layout.partition("-")[0]
    world, flags = LAYOUTS[layout]
    found = train(work, model, layout, world, **TUNERS[model], **flags)
    expected = log(work, f"{model}-alone")
    assert expected[-1]["lm loss"] < 0.9 * expected[0]["lm loss"]
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours["lm loss"], theirs["lm loss"]) <= 1e-5
        assert relative(ours["grad_norm"], theirs["grad_norm"]) <= 1e-5
    assert distance(adapters(work, layout), adapters(work, f"{model}-alone")) <= 1e-5


def tie(model: Any) -> None:
    """Give the layers that are one in Megatron one A."""
    for module in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            layers = [getattr(module, name, None) for name in names]
            if all(hasattr(layer, "lora_A") for layer in layers):
                for layer in layers[1:]:
                    layer.lora_A["default"].weight = layers[0].lora_A["default"].weight


@pytest.mark.parametrize("model", MODELS)
def test_ten_steps_are_those_of_peft(work: Path, model: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start = f"{model}-start"
    train(work, model, start, lr=0, train_iters=1, **TUNERS[model])
    base = AutoModelForCausalLM.from_pretrained(work / model, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, work / start / "iter_0000001-hf", is_trainable=True)
    tie(peft)
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    flat = [(p, 0.0 if p.dim() == 1 else 0.01) for p in trained.values()]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in flat]
    adam = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), eps=1e-3)
    for line in log(work, f"{model}-alone"):
        loss = transformers_loss(peft, work / model)
        assert relative(line["lm loss"], loss.item()) <= 1e-4
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        assert relative(line["grad_norm"], norm.item()) <= 1e-4
        adam.step()
        adam.zero_grad()
    peft.save_pretrained(work / f"{model}-peft", save_embedding_layers=False)
    from safetensors.torch import load_file

    ours = adapters(work, f"{model}-alone")
    assert distance(ours, load_file(work / f"{model}-peft" / "adapter_model.safetensors")) <= 1e-4


def test_a_run_continues_exactly_and_stores_no_weight_of_the_model(work: Path) -> None:
    """With dropout, in the middle of an epoch; the base comes from a Megatron checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    from tests.tuners.test_adapters import export

    export(work, "base", to_mcore="true", model=work / "biased")
    run: dict[str, Any] = {"lora_dropout": 0.1, "save_interval": 2, "global_batch_size": 8}
    run |= SEQUENCE | {"train_iters": 4, "load": work / "base"}
    whole = train(work, "biased", "whole", 2, **run)
    entries = FileSystemReader(work / "whole" / "iter_0000002").read_metadata().state_dict_metadata
    weights = {name for name in entries if not name.startswith(("optimizer.", "rng_state"))}
    assert all("lora_" in name for name in weights if name.endswith("weight"))
    assert len([name for name in weights if name.endswith("weight")]) == 4 * 4 * 2
    moments = [name for name in entries if name.startswith("optimizer.state.exp_avg.")]
    assert len(moments) == 4 * 4 * 2
    base = sum(path.stat().st_size for path in (work / "base").rglob("*.distcp"))
    ours = sum(path.stat().st_size for path in (work / "whole/iter_0000002").rglob("*.distcp"))
    assert ours < base
    del run["load"], run["lora_dropout"]  # the checkpoint's args.json knows them
    rest = train(work, "biased", "rest", 2, adapter_load=work / "whole", ckpt_step=2, **run)
    exact = ("lm loss", "grad_norm", "learning_rate", "consumed_samples", "global_step/max_steps")
    assert [{k: line[k] for k in exact} for line in rest] == [
        {k: line[k] for k in exact} for line in whole[2:]
    ]
    first, second = adapters(work, "whole", 4), adapters(work, "rest", 4)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_alpha_is_the_scale(work: Path) -> None:
    """It reaches the adapters' config; that both models scale by it, ten steps have shown."""
    from peft import PeftConfig

    train(work, "tied", "alpha", lr=0, train_iters=1, lora_alpha=6, **TUNERS["tied"])
    config = PeftConfig.from_pretrained(work / "alpha" / "iter_0000001-hf")
    assert (config.r, config.lora_alpha) == (4, 6)
