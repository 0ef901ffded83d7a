"""Flags that name what config.json says of the model's architecture.

What decides the weights' shapes must agree with config.json; what does not, overrides it.
"""

import copy
import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from swiftmeg.args.model_types import check_model_type
from swiftmeg.args.moe import ExpertShapeArguments, LatentShapeArguments, check_pattern
from swiftmeg.errors import UserError
from swiftmeg.models.arguments import ROPE_TYPES, ropes
from swiftmeg.models.hf import HFModel

_FIXED = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "group_query_attention": True,
}
"""What all families have in common; Megatron is told group_query_attention in any case."""

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}

OVERRIDES = ("rotary_base", "rope_scaling", "max_model_len", "norm_epsilon", "mtp_num_layers")
"""Flags that change what the same weights compute; a checkpoint's args.json hands them on."""


@dataclass
class OverrideArguments:
    """Architecture: overrides of config.json"""

    rotary_base: float | None = None
    """Base of RoPE. None: as in config.json."""
    rope_scaling: str | None = None
    """Scaling of RoPE: linear, dynamic or yarn, with --max_model_len, or a JSON object with
    `rope_type` and what it needs. None: as in config.json."""
    max_model_len: int | None = None
    """Longest input; with --rope_scaling, what its factor follows from."""
    norm_epsilon: float | None = None
    """Epsilon of the norms. None: as in config.json."""
    max_position_embeddings: int | None = None
    """Longest input. None: as in config.json; raised to the sequence length where that is more."""
    mtp_num_layers: int | None = None
    """Multi-token prediction modules to train and convert; 0: leave those of --model out. None:
    refuse a model that has some."""


@dataclass
class ShapeArguments:
    """Architecture: what must agree with config.json"""

    model_type: str | None = None
    """Name of the model's type, Megatron-SWIFT's or transformers'; the model's `architectures`
    say what it is."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Size of the residual stream."""
    ffn_hidden_size: int | None = None
    """Hidden size of the MLP."""
    num_attention_heads: int | None = None
    """Query heads."""
    group_query_attention: bool | None = None
    """Several query heads share a key head. True always; one head a group is plain attention."""
    num_query_groups: int | None = None
    """Key and value heads."""
    kv_channels: int | None = None
    """Size of a head."""
    position_embedding_type: (
        Literal["learned_absolute", "rope", "mrope", "relative", "none"] | None
    ) = None
    """Position embedding: rope."""
    rotary_percent: float | None = None
    """Share of a head that RoPE turns."""
    normalization: Literal["LayerNorm", "RMSNorm"] | None = None
    """Norm: RMSNorm."""
    swiglu: bool | None = None
    """Gated SiLU MLP: true."""
    untie_embeddings_and_output_weights: bool | None = None
    """The output layer has weights of its own."""
    disable_bias_linear: bool | None = None
    """No biases in the MLP."""
    add_qkv_bias: bool | None = None
    """Biases on queries, keys and values."""
    qk_layernorm: bool | None = None
    """Norms on queries and keys."""
    padded_vocab_size: int | None = None
    """Size of the vocabulary: config.json's; it is padded in memory by itself."""


def with_overrides(model: HFModel, args: Any) -> HFModel:
    """`model` as the architecture flags say; UserError where they cannot be."""
    _check_shapes(model, args)
    changes: dict[str, Any] = {}
    for flag, key in (
        ("norm_epsilon", "rms_norm_eps"),
        ("max_position_embeddings", "max_position_embeddings"),
    ):
        value = getattr(args, flag, None)
        if value is not None and value <= 0:
            raise UserError(f"--{flag} {value}: must be above 0")
        if value is not None:
            changes[key] = value
    if rope := _rope_changes(model, args):
        changes["rope_parameters"] = rope
    model = _with_predictions(model, getattr(args, "mtp_num_layers", None), changes)
    if not changes:
        return model
    hf_config = copy.deepcopy(model.hf_config)
    for key, value in changes.items():
        setattr(hf_config, key, value)
    return dataclasses.replace(model, hf_config=hf_config, overrides=changes)


def _with_predictions(model: HFModel, count: int | None, changes: dict[str, Any]) -> HFModel:
    """`model` with `count` prediction modules; `changes` learns where the config says otherwise."""
    if count is None:
        return model
    if count < 0:
        raise UserError(f"--mtp_num_layers {count}: must be at least 0")
    if count and model.family.predictions is None:
        raise UserError(
            f"--mtp_num_layers {count}: {model.family.architecture} has no multi-token prediction "
            "modules: drop it"
        )
    if model.config.get("num_nextn_predict_layers", count) != count:
        changes["num_nextn_predict_layers"] = count
    return dataclasses.replace(model, mtp_num_layers=count)


def _check_shapes(model: HFModel, args: Any) -> None:
    built = model.megatron_args
    has = {name: built.get(name, False) for name in _shape_names()}
    has |= _FIXED | {
        "disable_bias_linear": not built.get("mlp_bias", False),
        "padded_vocab_size": built["vocab_size"],
        "rotary_percent": built.get("rotary_percent", 1.0),
        "moe_router_topk_scaling_factor": built.get("moe_router_topk_scaling_factor") or 1.0,
    }
    check_model_type(model, getattr(args, "model_type", None))
    check_pattern(model, getattr(args, "moe_layer_freq", None))
    del has["moe_layer_freq"], has["model_type"]
    for name, value in has.items():
        wanted = getattr(args, name, None)
        if wanted is not None and wanted != value:
            shown = str(wanted).lower() if isinstance(wanted, bool) else wanted
            raise UserError(
                f"--{name} {shown} contradicts --model {model.folder}, whose weights have "
                f"{name}={str(value).lower() if isinstance(value, bool) else value}: drop it"
            )


def _shape_names() -> list[str]:
    groups = (ShapeArguments, ExpertShapeArguments, LatentShapeArguments)
    return [field.name for group in groups for field in dataclasses.fields(group)]


def _rope_changes(model: HFModel, args: Any) -> dict[str, Any] | None:
    """The new rope_parameters, or None where the flags change nothing."""
    base = getattr(args, "rotary_base", None)
    text = getattr(args, "rope_scaling", None)
    longest = getattr(args, "max_model_len", None)
    if longest is not None and text is None:
        raise UserError(
            f"--max_model_len {longest} needs --rope_scaling: set it, or use --max_length to "
            "limit samples"
        )
    if base is None and text is None:
        return None
    if None not in ropes(model.config):
        raise UserError(
            f"--{'rotary_base' if text is None else 'rope_scaling'}: the layers of {model.folder} "
            "differ in RoPE: drop it, or change rope_parameters in config.json"
        )
    rope = dict(model.hf_config.rope_parameters or {})
    rope.setdefault("rope_type", "default")
    if text is not None:
        theta = rope.get("rope_theta", 10000.0)
        rope = {"rope_theta": theta} | _scaling(text, longest, model)
    if base is not None:
        if base <= 1:
            raise UserError(f"--rotary_base {base}: must be above 1")
        rope["rope_theta"] = base
    return rope


def _scaling(text: str, longest: int | None, model: HFModel) -> dict[str, Any]:
    scaling: Any = {"rope_type": text}
    if text.lstrip().startswith("{"):
        try:
            scaling = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--rope_scaling {text!r} is not JSON ({error})") from None
        scaling.setdefault("rope_type", scaling.pop("type", None))
    kind = scaling["rope_type"]
    if kind not in ROPE_TYPES:
        raise UserError(
            f"--rope_scaling: rope_type {kind!r} is not supported: use one of "
            f"{', '.join(ROPE_TYPES)}"
        )
    positions = model.config["max_position_embeddings"]
    if longest is not None and "factor" in _ROPE_KEYS[kind]:
        scaling.setdefault("factor", float(max(math.ceil(longest / positions), 1)))
    if missing := [key for key in _ROPE_KEYS[kind] if key not in scaling]:
        hint = "set --max_model_len or " if missing == ["factor"] else ""
        raise UserError(
            f"--rope_scaling {text}: {kind} needs {', '.join(missing)}: {hint}write a JSON object"
        )
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", positions)
    return dict(scaling)
