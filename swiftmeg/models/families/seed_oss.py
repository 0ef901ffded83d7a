"""SeedOssForCausalLM: Seed-OSS-36B."""

from typing import Any

from swiftmeg.models.arguments import dense_args
from swiftmeg.models.families.llama import LLAMA
from swiftmeg.models.family import REGISTRY, HFConfig


def to_args(config: HFConfig) -> dict[str, Any]:
    """Biases on q, k and v, and on the output projection, are switched one by one.

    Its `residual_dropout` is --hidden_dropout, and off unless that is given.
    """
    return dense_args(config) | {
        "add_qkv_bias": config["attention_bias"],
        "attention_output_bias": config["attention_out_bias"],
        "mlp_bias": config["mlp_bias"],
    }


SEED_OSS = REGISTRY.add(LLAMA.variant("SeedOssForCausalLM", to_args))
