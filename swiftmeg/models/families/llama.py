"""LlamaForCausalLM: Llama 2, 3, 3.x and the many models published in its form."""

from typing import Any

from swiftmeg.models.arguments import dense_args
from swiftmeg.models.family import REGISTRY, Family, HFConfig
from swiftmeg.models.weight_rows import DENSE_ROWS


def to_args(config: HFConfig) -> dict[str, Any]:
    """`attention_bias` covers q, k, v and o; `mlp_bias` the MLP."""
    attention_bias = config.get("attention_bias", False)
    return dense_args(config) | {
        "add_qkv_bias": attention_bias,
        "attention_output_bias": attention_bias,
        "mlp_bias": config.get("mlp_bias", False),
    }


LLAMA = REGISTRY.add(
    Family(
        "LlamaForCausalLM",
        to_args,
        DENSE_ROWS,
        ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    )
)
