"""MixtralForCausalLM: Mixtral 8x7B and 8x22B."""

from typing import Any

from swiftmeg.models.arguments import dense_args, expert_args, softmax_router_args
from swiftmeg.models.families.mistral import MISTRAL
from swiftmeg.models.family import REGISTRY, HFConfig, row
from swiftmeg.models.weight_rows import HF_LAYER, MLP, MOE_ROWS, expert_rows

_HF_MOE = HF_LAYER + "block_sparse_moe."


def to_args(config: HFConfig) -> dict[str, Any]:
    """Experts in every layer, the size of the MLP that they replace; weights sum to one."""
    sizes = {"moe_intermediate_size": config["intermediate_size"], "norm_topk_prob": True}
    layers = [1] * config["num_hidden_layers"]
    return (
        dense_args(config, windows=True)
        | softmax_router_args(sizes, config["num_experts_per_tok"])
        | expert_args(sizes, config["num_local_experts"], layers)
    )


MIXTRAL = REGISTRY.add(
    MISTRAL.variant(
        "MixtralForCausalLM",
        to_args,
        (
            *MOE_ROWS,
            row(MLP + "router.weight", _HF_MOE + "gate.weight"),
            *expert_rows("w1", "w3", "w2", _HF_MOE + "experts.{e}."),
        ),
    )
)
