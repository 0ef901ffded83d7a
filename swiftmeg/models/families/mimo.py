"""MiMoForCausalLM: MiMo-7B."""

from typing import Any

from swiftmeg.models.families import qwen2
from swiftmeg.models.family import REGISTRY, HFConfig, row
from swiftmeg.models.layout import SWAPPED_HALVES
from swiftmeg.models.weight_rows import DENSE_ROWS, MTP_LAYER, prediction_rows

_HF_PREDICTION = "model.mtp_layers.{i}."


def to_args(config: HFConfig) -> dict[str, Any]:
    """Qwen2's layers, and one that predicts a second token from what the final norm reads.

    So does vLLM, to which Xiaomi contributed the model.
    """
    return qwen2.to_args(config) | {
        "add_qkv_bias": config.get("attention_bias", True),
        "mtp_num_layers": config.get("mtp_num_layers") or None,
        "predictions_before_norm": True,
    }


MIMO = REGISTRY.add(
    qwen2.QWEN2.variant(
        "MiMoForCausalLM",
        to_args,
        (
            row(MTP_LAYER + "enorm.weight", _HF_PREDICTION + "token_layernorm.weight"),
            row(MTP_LAYER + "hnorm.weight", _HF_PREDICTION + "hidden_layernorm.weight"),
            # It reads [hidden; embedding] where Megatron concatenates [embedding; hidden].
            row(
                MTP_LAYER + "eh_proj.weight",
                _HF_PREDICTION + "input_proj.weight",
                layout=SWAPPED_HALVES,
            ),
            row(MTP_LAYER + "final_layernorm.weight", _HF_PREDICTION + "final_layernorm.weight"),
            *prediction_rows(DENSE_ROWS, _HF_PREDICTION),
        ),
        config_class="qwen2",
        predictions=r"model\.mtp_layers\.\d+\..*",
    )
)
