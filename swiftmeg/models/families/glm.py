"""GlmForCausalLM: GLM-4-9B in transformers' form."""

from typing import Any

from swiftmeg.models.arguments import dense_args, rotary_percent
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig, row
from swiftmeg.models.layout import GATE_UP_TOGETHER
from swiftmeg.models.weight_rows import HF_MLP, MLP


def to_args(config: HFConfig) -> dict[str, Any]:
    """Biases on q, k and v only; RoPE turns neighbouring pairs in a part of each head."""
    return dense_args(config) | {
        "add_qkv_bias": config.get("attention_bias", True),
        "rotary_percent": rotary_percent(config),
        "rotary_interleaved": True,
    }


GLM = REGISTRY.add(
    LLAMA.variant(
        "GlmForCausalLM",
        to_args,
        (row(MLP + "linear_fc1.weight", HF_MLP + "gate_up_proj.weight", layout=GATE_UP_TOGETHER),),
    )
)
