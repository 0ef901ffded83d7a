"""GptOssForCausalLM: gpt-oss-20b and -120b."""

import dataclasses
from typing import Any

from swiftmeg.models.arguments import dense_args, expert_args, refuse, softmax_router_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig, Row, row
from swiftmeg.models.layout import COPY, GATE_UP_COLUMNS, TRANSPOSED, Layout
from swiftmeg.models.weight_rows import ATTENTION, HF_ATTENTION, HF_MLP, MLP


def to_args(config: HFConfig) -> dict[str, Any]:
    """Sinks, windows in every other layer, and experts with biases and a clamped gate.

    Its config.json has a weight for balancing experts that transformers leaves unused unless
    `output_router_logits` is set; so experts are not balanced unless a flag says so.
    """
    if config.get("swiglu_alpha", 1.702) != 1.702:
        raise refuse("swiglu_alpha", config["swiglu_alpha"], "1.702")
    bias = config.get("attention_bias", True)
    sizes = config | {"moe_intermediate_size": config["intermediate_size"], "norm_topk_prob": True}
    layers = [1] * config["num_hidden_layers"]
    return (
        dense_args(config, windows=True)
        | {
            "add_qkv_bias": bias,
            "attention_output_bias": bias,
            "softmax_type": "learnable",
            # quick_gelu(min(gate, limit)) * (clamp(up, -limit, limit) + 1)
            "quick_geglu": True,
            "activation_func_clamp_value": config.get("swiglu_limit", 7.0),
            "glu_linear_offset": 1.0,
            "expert_bias": True,
            "moe_router_load_balancing_type": "none",
        }
        | softmax_router_args(sizes, config["num_experts_per_tok"])
        | expert_args(sizes, config["num_local_experts"], layers)
    )


def _expert_row(name: str, stack: str, layout: Layout) -> Row:
    """One expert's slice of the tensor that holds all experts of a layer."""
    stack = f"{HF_MLP}experts.{stack}"
    made = row(f"{MLP}experts.{name}{{e}}", stack, layout=layout)
    return dataclasses.replace(made, stack=stack)


GPT_OSS = REGISTRY.add(
    LLAMA.variant(
        "GptOssForCausalLM",
        to_args,
        (
            row(ATTENTION + "core_attention.softmax_offset", HF_ATTENTION + "sinks"),
            row(MLP + "router.weight", HF_MLP + "router.weight"),
            row(MLP + "router.bias", HF_MLP + "router.bias"),
            _expert_row("linear_fc1.weight", "gate_up_proj", GATE_UP_COLUMNS),
            _expert_row("linear_fc1.bias", "gate_up_proj_bias", GATE_UP_COLUMNS),
            _expert_row("linear_fc2.weight", "down_proj", TRANSPOSED),
            _expert_row("linear_fc2.bias", "down_proj_bias", COPY),
        ),
    )
)
