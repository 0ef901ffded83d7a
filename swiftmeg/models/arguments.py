"""Megatron arguments that families share, from config.json.

Every function raises UserError, naming the key, for what the layers cannot express.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from swiftmeg.errors import UserError
from swiftmeg.models.family import HFConfig


@dataclass(frozen=True)
class LayerSwitches:
    """What families say of their layers and Megatron's configuration cannot express."""

    attention_output_bias: bool = False
    """A bias on the projection after attention."""
    mlp_bias: bool = False
    """Biases in the dense MLP."""
    expert_bias: bool = False
    """Biases in experts and their router."""
    norm_before: bool = True
    """Norms of what enters attention and MLP."""
    norm_after: bool = False
    """Norms of what attention and MLP add to the residual stream."""
    qk_norm_across_heads: bool = False
    """The norms of queries and keys (`qk_layernorm`) span all heads, not each by itself."""
    router_fp32: bool = False
    """The router's weight is float32 whatever the dtype of the others."""
    router_softmax_bias: bool = False
    """The expert bias is added to softmax scores."""
    router_best_of_group: bool = False
    """A group of experts counts by its best expert."""
    predictions_before_norm: bool = False
    """Prediction modules read the decoder's output before the final norm, not after it."""

    @classmethod
    def of(cls, args: Any) -> "LayerSwitches":
        """The switches that are attributes of Megatron's namespace."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(cls)})


MODEL_SWITCHES = asdict(LayerSwitches())
"""The switches and their defaults; they are attributes of Megatron's namespace, not arguments."""

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Scalings of RoPE that are supported."""


def refuse(key: str, value: Any, accepted: str) -> UserError:
    """The error for a value of config.json that no layer can compute."""
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return UserError(
        f"config.json: {key}={shown} is not supported ({accepted} is): use another model"
    )


_LARGEST = {
    "num_layers": ("num_hidden_layers", 10_000),
    "hidden_size": ("hidden_size", 2**20),
    "ffn_hidden_size": ("intermediate_size", 2**24),
    "num_attention_heads": ("num_attention_heads", 2**16),
    "num_query_groups": ("num_key_value_heads", 2**16),
    "kv_channels": ("head_dim", 2**16),
    "vocab_size": ("vocab_size", 2**26),
    "max_position_embeddings": ("max_position_embeddings", 2**40),
}
"""Argument -> the key of config.json, and a number that no model comes near."""


def check_sizes(arguments: dict[str, Any]) -> None:
    """UserError, naming the key of config.json, for sizes that no model can have."""
    for name, (key, largest) in _LARGEST.items():
        value = arguments.get(name)
        if value is not None and not (type(value) is int and 0 < value <= largest):
            raise UserError(
                f"config.json: {key}={value!r} is no size of a model (1 to {largest} is): repair "
                "it, or download it again"
            )
    for name, key in (("norm_epsilon", "rms_norm_eps"), ("rotary_base", "rope_theta")):
        value = arguments.get(name)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (known and 0 < value < math.inf):
            raise UserError(
                f"config.json: {key}={value!r} is no positive number: repair it, or download it "
                "again"
            )


def rope_theta(config: HFConfig) -> float:
    """RoPE's base from `rope_theta` or, as transformers 5 writes it, `rope_parameters`."""
    nested = config.get("rope_parameters") or {}
    return float(nested.get("rope_theta") or config.get("rope_theta") or 10000.0)


def ropes(config: HFConfig) -> dict[str | None, dict[str, Any]]:
    """`rope_parameters` by type of layer; all of them under None where layers share them."""
    nested = config.get("rope_parameters") or {}
    types = config.get("layer_types") or ()
    return {kind: nested[kind] for kind in types if kind in nested} or {None: nested}


def rope_type(config: HFConfig, layer_type: str | None = None) -> str:
    """RoPE's scaling in layers of a type; UserError if it is not supported."""
    kind = ropes(config)[layer_type].get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UserError(
            f"config.json: rope_type {kind!r} is not supported; {', '.join(ROPE_TYPES)} are: "
            "use another model"
        )
    return str(kind)


def rotary_percent(config: HFConfig) -> float:
    """The share of a head that RoPE turns."""
    nested = config.get("rope_parameters") or {}
    return float(nested.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def window_args(config: HFConfig) -> dict[str, Any]:
    """Layers in which a token sees itself and the `sliding_window` - 1 tokens before it."""
    kinds = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise refuse("layer_types", unknown.pop(), "full_attention or sliding_attention")
    window = config.get("sliding_window")
    if window is None or "sliding_attention" not in kinds:
        return {}
    return {
        "window_size": f"{window - 1},0",
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds],
    }


def dense_args(config: HFConfig, windows: bool = False) -> dict[str, Any]:
    """What all RMSNorm + SwiGLU decoders share; `windows` for families that may attend in some."""
    rope_type(config)
    if not windows and (other := set(config.get("layer_types") or ()) - {"full_attention"}):
        raise refuse("layer_types", other.pop(), "full_attention")
    heads = config["num_attention_heads"]
    if config.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", config["hidden_act"], "silu")
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "norm_epsilon": config["rms_norm_eps"],
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "rotary_base": rope_theta(config),
        "attention_dropout": config.get("attention_dropout") or 0.0,
        **(window_args(config) if windows else {}),
    }


def softmax_router_args(config: HFConfig, topk: int) -> dict[str, Any]:
    """Softmax over all experts; `norm_topk_prob` lets the chosen ones sum to one.

    The latter equals a softmax over the chosen logits, which is how Megatron computes it.
    """
    return {
        "moe_router_score_function": "softmax",
        "moe_router_topk": topk,
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
    }


def sigmoid_router_args(config: HFConfig, topk: int) -> dict[str, Any]:
    """DeepSeek-V3's router (arXiv:2412.19437): sigmoid scores, a bias that only chooses."""
    if not config.get("norm_topk_prob", True):
        raise refuse("norm_topk_prob", False, "true with a sigmoid router")
    if topk == 1:
        raise refuse("num_experts_per_tok", 1, "2 or more with a sigmoid router")
    scaling = config.get("routed_scaling_factor") or 1.0
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_topk": topk,
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": scaling if scaling != 1.0 else None,
        **_group_args(config, topk),
    }


def _group_args(config: HFConfig, topk: int) -> dict[str, Any]:
    """Choice within the best groups of experts, each scored by its two best experts."""
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    if groups == chosen:
        return {}
    return group_args(config, topk, least=2)


def group_args(config: HFConfig, topk: int, least: int) -> dict[str, Any]:
    """Choice of `topk` experts in the `topk_group` best of `n_group` groups.

    UserError unless the groups divide the experts, have `least` of them each, and those that are
    chosen have `topk` together.
    """
    count = config.get("n_routed_experts") or config["num_local_experts"]
    groups, chosen = config["n_group"], config["topk_group"]
    if groups < 1 or count % groups or count // groups < least:
        raise refuse("n_group", groups, f"a divisor of {count} experts that leaves {least} a group")
    if not -(-topk * groups // count) <= chosen <= groups:
        raise refuse(
            "topk_group", chosen, f"as many groups as have {topk} experts, {groups} at most,"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def expert_args(
    config: HFConfig, count: int, layers: list[int], shared: int | None = None
) -> dict[str, Any]:
    """`count` routed experts in the layers that are 1 in `layers`; shared ones of size `shared`.

    Without such layers, what a router's arguments say must not be said.
    """
    if not any(layers):
        return {
            "num_experts": None,
            "moe_router_enable_expert_bias": False,
            "moe_router_num_groups": None,
            "moe_router_group_topk": None,
        }
    return {
        "num_experts": count,
        "moe_layer_freq": layers,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": shared or None,
    }


def shared_size(config: HFConfig) -> int:
    """Hidden size of all shared experts together, which are one MLP."""
    return int((config.get("n_shared_experts") or 0) * config["moe_intermediate_size"])


def dense_then_experts(config: HFConfig) -> list[int]:
    """DeepSeek's pattern: `first_k_dense_replace` dense layers, then every `moe_layer_freq`-th."""
    first = config.get("first_k_dense_replace") or 0
    every = config.get("moe_layer_freq") or 1
    layers = range(config["num_hidden_layers"])
    return [int(i >= first and i % every == 0) for i in layers]


def latent_attention_args(config: HFConfig) -> dict[str, Any]:
    """Multi-head latent attention (arXiv:2405.04434), with yarn's factor on the softmax."""
    if config.get("attention_bias"):
        raise refuse("attention_bias", True, "false with latent attention")
    if config.get("rope_interleave", True) is False:
        raise refuse("rope_interleave", False, "true")
    heads = config["num_attention_heads"]
    if (config.get("num_key_value_heads") or heads) != heads:
        raise refuse("num_key_value_heads", config["num_key_value_heads"], f"{heads}")
    rope = config.get("rope_parameters") or {}
    scaled = rope_type(config) != "default"
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "num_query_groups": heads,
        "kv_channels": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        # Megatron's factor on the softmax is the square of 0.1 * mscale_all_dim * ln(factor) + 1.
        "rope_type": "rope",
        "rotary_scaling_factor": float(rope.get("factor") or 1.0) if scaled else 1.0,
        "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0) if scaled else 0.0,
    }
