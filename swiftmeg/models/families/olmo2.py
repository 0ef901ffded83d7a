"""Olmo2ForCausalLM: OLMo 2."""

from typing import Any

from swiftmeg.models.arguments import dense_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig, row
from swiftmeg.models.weight_rows import HF_LAYER, LAYER


def to_args(config: HFConfig, windows: bool = False) -> dict[str, Any]:
    """Norms after attention and MLP only, and over all queries and keys of a token together."""
    bias = config.get("attention_bias", False)
    return dense_args(config, windows) | {
        "qk_layernorm": True,
        "qk_norm_across_heads": True,
        "norm_before": False,
        "norm_after": True,
        "add_qkv_bias": bias,
        "attention_output_bias": bias,
    }


OLMO2 = REGISTRY.add(
    LLAMA.variant(
        "Olmo2ForCausalLM",
        to_args,
        (
            row(
                LAYER + "post_self_attn_layernorm.weight",
                HF_LAYER + "post_attention_layernorm.weight",
            ),
            row(
                LAYER + "post_mlp_layernorm.weight",
                HF_LAYER + "post_feedforward_layernorm.weight",
            ),
        ),
    )
)
