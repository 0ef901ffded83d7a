"""InternLM3ForCausalLM: Llama with its own names for the biases."""

from typing import Any

from swiftmeg.models.arguments import dense_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig


def adapt(config: HFConfig) -> HFConfig:
    """Llama's names beside the published ones."""
    names = {"attention_bias": "qkv_bias", "mlp_bias": "bias"}
    return config | {ours: config.get(theirs, False) for ours, theirs in names.items()}


def to_args(config: HFConfig) -> dict[str, Any]:
    """`qkv_bias` covers q, k and v; `bias` the output projection and the MLP."""
    bias = config.get("bias", False)
    return dense_args(config) | {
        "add_qkv_bias": config.get("qkv_bias", False),
        "attention_output_bias": bias,
        "mlp_bias": bias,
    }


INTERNLM3 = REGISTRY.add(
    LLAMA.variant("InternLM3ForCausalLM", to_args, config_class="llama", adapt=adapt)
)
