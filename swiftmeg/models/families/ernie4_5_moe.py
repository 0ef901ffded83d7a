"""Ernie4_5_MoeForCausalLM: ERNIE 4.5 21B-A3B and 300B-A47B."""

from typing import Any

from swiftmeg.models.arguments import expert_args, refuse
from swiftmeg.models.families import ernie4_5
from swiftmeg.models.family import REGISTRY, HFConfig, row
from swiftmeg.models.layout import ONE_ROW
from swiftmeg.models.weight_rows import HF_MLP, MLP, MOE_ROWS, shared_expert_rows


def _layers(config: HFConfig) -> list[int]:
    """1 for the layers with experts: every `moe_layer_interval`-th from start to end index."""
    count, every = config["num_hidden_layers"], config.get("moe_layer_interval") or 1
    first, last = config.get("moe_layer_start_index") or 0, config.get("moe_layer_end_index")
    last = count - 1 if last in (None, -1) else last
    return [int(first <= i <= last and (i + 1) % every == 0) for i in range(count)]


def to_args(config: HFConfig) -> dict[str, Any]:
    """Softmax scores choose with a bias and weigh without it, summing to one."""
    if config.get("use_bias"):
        raise refuse("use_bias", True, "false with experts")
    shared = (config.get("moe_num_shared_experts") or 0) * config["moe_intermediate_size"]
    return (
        ernie4_5.to_args(config)
        | {
            # Megatron allows a bias with other scores only; the switch replaces them.
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "router_softmax_bias": True,
            "router_fp32": True,
            "moe_router_topk": config["moe_k"],
        }
        | expert_args(config, config["moe_num_experts"], _layers(config), shared)
    )


ERNIE4_5_MOE = REGISTRY.add(
    ernie4_5.ERNIE4_5.variant(
        "Ernie4_5_MoeForCausalLM",
        to_args,
        (
            *MOE_ROWS,
            *shared_expert_rows("shared_experts"),
            row(MLP + "router.weight", HF_MLP + "gate.weight", fp32=True),
            row(
                MLP + "router.expert_bias",
                HF_MLP + "moe_statics.e_score_correction_bias",
                layout=ONE_ROW,
                fp32=True,
            ),
        ),
    )
)
