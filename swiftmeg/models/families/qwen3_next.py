"""Qwen3NextForCausalLM: Qwen3-Next-80B-A3B."""

from typing import Any

from swiftmeg.models.arguments import refuse, rotary_percent
from swiftmeg.models.families import qwen2_moe
from swiftmeg.models.families.qwen2_moe import QWEN2_MOE
from swiftmeg.models.family import REGISTRY, HFConfig, row
from swiftmeg.models.layout import DELTA_CONVOLUTION, DELTA_INPUTS, GATED_QKV
from swiftmeg.models.weight_rows import (
    ATTENTION,
    HF_ATTENTION,
    HF_LAYER,
    MTP_LAYER,
    prediction_rows,
)

_HF_LINEAR = HF_LAYER + "linear_attn."


def linear_attention_args(config: HFConfig, predictions: int) -> dict[str, Any]:
    """Layers of gated delta nets (arXiv:2412.06464) among those of attention.

    Megatron's count of operations expects the prediction layers, which have attention, at the end
    of the pattern.
    """
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if values % keys:
        raise refuse("linear_num_value_heads", values, f"a multiple of linear_num_key_heads={keys}")
    kinds = config["layer_types"]
    if unknown := set(kinds) - {"full_attention", "linear_attention"}:
        raise refuse("layer_types", unknown.pop(), "full_attention or linear_attention")
    if "linear_attention" not in kinds:
        return {}
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [
            *(int(kind == "linear_attention") for kind in kinds),
            *[0] * predictions,
        ],
        "linear_conv_kernel_dim": config["linear_conv_kernel_dim"],
        "linear_key_head_dim": config["linear_key_head_dim"],
        "linear_value_head_dim": config["linear_value_head_dim"],
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
    }


def to_args(config: HFConfig) -> dict[str, Any]:
    """Gated delta nets and gated attention; norms store their difference from one."""
    bias = config.get("attention_bias", False)
    predicted = config.get("mtp_num_layers") or None
    if (predicted or 1) > 1:
        raise refuse("mtp_num_layers", predicted, "1")
    return (
        qwen2_moe.to_args(config | {"layer_types": None, "sliding_window": None})
        | linear_attention_args(config, predicted or 0)
        | {
            "add_qkv_bias": bias,
            "attention_output_bias": bias,
            "attention_output_gate": True,
            "qk_layernorm": True,
            "apply_layernorm_1p": True,
            "rotary_percent": rotary_percent(config),
            "mtp_num_layers": predicted,
        }
    )


_ROWS = (
    *QWEN2_MOE.rows,
    *(
        row(
            f"{ATTENTION}linear_qkv.{kind}",
            *(f"{HF_ATTENTION}{x}_proj.{kind}" for x in "qkv"),
            layout=GATED_QKV,
        )
        for kind in ("weight", "bias")
    ),
    row(
        ATTENTION + "in_proj.weight",
        _HF_LINEAR + "in_proj_qkvz.weight",
        _HF_LINEAR + "in_proj_ba.weight",
        layout=DELTA_INPUTS,
    ),
    row(ATTENTION + "conv1d.weight", _HF_LINEAR + "conv1d.weight", layout=DELTA_CONVOLUTION),
    row(ATTENTION + "dt_bias", _HF_LINEAR + "dt_bias"),
    row(ATTENTION + "A_log", _HF_LINEAR + "A_log"),
    row(ATTENTION + "out_norm.weight", _HF_LINEAR + "norm.weight"),
    row(ATTENTION + "out_proj.weight", _HF_LINEAR + "out_proj.weight"),
)

_PREDICTION = (
    ("enorm", "pre_fc_norm_embedding"),
    ("hnorm", "pre_fc_norm_hidden"),
    ("eh_proj", "fc"),
    ("final_layernorm", "norm"),
)

QWEN3_NEXT = REGISTRY.add(
    QWEN2_MOE.variant(
        "Qwen3NextForCausalLM",
        to_args,
        (
            *_ROWS,
            *(row(f"{MTP_LAYER}{m}.weight", f"mtp.{hf}.weight") for m, hf in _PREDICTION),
            *prediction_rows(_ROWS, "mtp.layers.{i}."),
        ),
        predictions=r"mtp\..*",
    )
)
