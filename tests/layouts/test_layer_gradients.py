"""First steps of models with less common layers: gradients are those of transformers everywhere."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.references import relative, transformers_loss, write_rows
from tests.runs import DESCENT, EXPERT, SEQUENCE, TENSOR, load_folder, train_steps
from tests.tiny import save_model

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "glm4": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "olmo2": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "olmo3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 11,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "olmoe": {"num_attention_heads": 4, "num_key_value_heads": 2} | EXPERTS,
    "qwen3_next": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 10,
        "linear_value_head_dim": 6,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 28,
        "rms_norm_eps": 1e-2,
    }
    | EXPERTS,
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 11},
    "deepseek_v3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 18,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "num_mtp_layers": 0,
    },
    "gpt_oss": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 11,
        "swiglu_limit": 0.6,
    },
}
"""Norms before and after; across heads, fewer key heads than ranks; with windows and a RoPE for
each type of layer; across heads with experts; gated delta nets around
gated attention, with experts; windows; latent attention without experts; sinks, windows in every
other layer, experts with biases and a clamped gate."""

ROWS = 8
STEP = DESCENT | {"global_batch_size": ROWS}

CONTEXT = {"context_parallel_size": 2}
PADDED = {"padding_free": "false", "micro_batch_size": 4}
LAYOUTS: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {
    ("glm4", "padded"): (1, PADDED),
    ("glm4", "tp2-sp"): (2, SEQUENCE),
    ("olmo2", "packed"): (1, {}),
    ("olmo2", "tp2"): (2, TENSOR),
    ("olmo3", "tp2-sp-cp2-padded"): (4, SEQUENCE | CONTEXT | PADDED),
    ("olmoe", "tp2-sp"): (2, SEQUENCE | {"expert_tensor_parallel_size": 1}),
    ("qwen3_next", "packed"): (1, {}),
    ("qwen3_next", "padded-ep2-full-recompute"): (
        2,
        PADDED
        | EXPERT
        | {
            "micro_batch_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    ("qwen3_next", "tp2-sp-cp2"): (4, SEQUENCE | CONTEXT),
    ("qwen3_next", "pp2-cp2-padded"): (
        4,
        PADDED
        | CONTEXT
        | {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
    ),
    ("mistral", "cp2"): (2, CONTEXT),
    ("deepseek_v3", "tp2"): (2, TENSOR | {"sequence_parallel": "false"}),
    ("gpt_oss", "packed"): (1, {}),
    ("gpt_oss", "padded-ep2"): (2, PADDED | EXPERT | {"micro_batch_size": 2}),
    ("gpt_oss", "etp2-cp2"): (4, SEQUENCE | CONTEXT),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    for name, sizes in MODELS.items():
        save_model(folder / name, name, **{"num_hidden_layers": 2} | sizes)
    write_rows(folder, ROWS)
    return folder


def published(fused: dict[str, Any], names: Collection[str]) -> dict[str, torch.Tensor]:
    """Gradients by the names of what is published: of stacked experts' parts, if not of stacks."""
    found: dict[str, torch.Tensor] = {}
    for name, gradient in fused.items():
        if name in names:
            found[name] = gradient
            continue
        prefix, _, last = name.rpartition(".")
        for expert, both in enumerate(gradient):
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            for part, piece in zip(parts, both.chunk(len(parts)), strict=True):
                found[f"{prefix}.{expert}.{part}.weight"] = piece
    return found


_references: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}


def reference(work: Path, name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' loss and gradients."""
    if name not in _references:
        model = AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32)
        loss = transformers_loss(model, work / name, ROWS)
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        _references[name] = loss.item(), published(gradients, load_folder(work / name).keys())
    return _references[name]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_first_step_is_that_of_transformers(work: Path, name: str, layout: str) -> None:
    world, flags = LAYOUTS[name, layout]
    (line,) = train_steps(work, name, layout, world, STEP | flags)
    loss, expected = reference(work, name)
    assert relative(line["lm loss"], loss) <= 1e-5
    norm = float(sum(gradient.square().sum() for gradient in expected.values())) ** 0.5
    assert relative(line["grad_norm"], norm) <= 1e-5
    before = load_folder(work / name)
    after = load_folder(work / f"{name}-{layout}" / "iter_0000001-hf")
    assert before.keys() == after.keys() == expected.keys()
    for key, gradient in expected.items():
        found = (before[key] - after[key]) / STEP["lr"]
        assert gradient.norm() > 0, key
        assert (found - gradient).norm() <= 2e-5 * gradient.norm(), key
