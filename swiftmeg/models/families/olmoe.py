"""OlmoeForCausalLM: OLMoE 1B-7B."""

from typing import Any

from swiftmeg.models.arguments import dense_args, expert_args, refuse, softmax_router_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig
from swiftmeg.models.weight_rows import MOE_ROWS


def to_args(config: HFConfig) -> dict[str, Any]:
    """Experts in every layer; norms over all queries and keys of a token together."""
    if config.get("clip_qkv") is not None:
        raise refuse("clip_qkv", config["clip_qkv"], "null")
    bias = config.get("attention_bias", False)
    sizes = config | {"moe_intermediate_size": config["intermediate_size"]}
    layers = [1] * config["num_hidden_layers"]
    return (
        dense_args(config)
        | {
            "qk_layernorm": True,
            "qk_norm_across_heads": True,
            "add_qkv_bias": bias,
            "attention_output_bias": bias,
        }
        | softmax_router_args(config, config["num_experts_per_tok"])
        | expert_args(sizes, config["num_experts"], layers)
    )


OLMOE = REGISTRY.add(LLAMA.variant("OlmoeForCausalLM", to_args, MOE_ROWS))
