"""What a model family is: Megatron arguments from config.json, and weight rows used both ways.

A row states one fact, "these HF tensors are that Megatron parameter in this layout", and serves
loading and saving alike. Parameter names are Megatron's own with global layer numbers, in the
spelling of unfused layers: norms are `input_layernorm` and `pre_mlp_layernorm` also where
TransformerEngine keeps them inside the following linear.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from swiftmeg.errors import UserError
from swiftmeg.models.layout import COPY, GATE_UP, QKV, VOCABULARY, Layout

HFConfig = dict[str, Any]
"""A checkpoint's config.json."""


@dataclass(frozen=True)
class Row:
    """HF tensors `hf` are Megatron parameter `mcore`, joined by `layout`; `{i}`: a layer number."""

    mcore: str
    hf: tuple[str, ...]
    layout: Layout = COPY

    def at(self, layer: int) -> "Row":
        """The row of one layer."""
        return Row(
            self.mcore.replace("{i}", str(layer)),
            tuple(name.replace("{i}", str(layer)) for name in self.hf),
            self.layout,
        )


def row(mcore: str, *hf: str, layout: Layout = COPY) -> Row:
    """Write a row without tuple brackets."""
    return Row(mcore, hf, layout)


_OPTIONAL = {
    "q_layernorm.weight": "qk_layernorm",
    "k_layernorm.weight": "qk_layernorm",
    "linear_qkv.bias": "add_qkv_bias",
    "linear_proj.bias": "attention_output_bias",
    "linear_fc1.bias": "mlp_bias",
    "linear_fc2.bias": "mlp_bias",
}
"""Parameters, by suffix, that exist only where the argument is true."""


@dataclass(frozen=True)
class Family:
    """One HF architecture.

    `to_args` maps config.json to Megatron arguments (names as in Megatron's namespace) and to two
    switches that Megatron lacks: `attention_output_bias` and `mlp_bias`.
    `rows` lists every weight that a checkpoint of this family can have; rows whose Megatron
    parameter a configuration does not build (biases, tied heads) are left out by `plan`.
    """

    architecture: str
    to_args: Callable[[HFConfig], dict[str, Any]]
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    """Regular expressions of HF buffers that carry no weight."""

    def plan(self, config: HFConfig) -> list[Row]:
        """Every weight of a model with this config, layers expanded."""
        return list(self._expand(config))

    def _expand(self, config: HFConfig) -> Iterator[Row]:
        built = self.to_args(config)
        for each in self.rows:
            if not _is_built(each.mcore, built):
                continue
            if "{i}" in each.mcore:
                yield from (each.at(layer) for layer in range(built["num_layers"]))
            else:
                yield each

    def is_ignored(self, name: str) -> bool:
        """True for an HF tensor that is known to carry no weight."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def _is_built(mcore: str, args: dict[str, Any]) -> bool:
    """Whether a model with these arguments has parameter `mcore`."""
    if mcore == "output_layer.weight":
        return bool(args["untie_embeddings_and_output_weights"])
    for suffix, switch in _OPTIONAL.items():
        if mcore.endswith(suffix):
            return bool(args.get(switch))
    return True


@dataclass
class _Registry:
    families: dict[str, Family] = field(default_factory=dict)

    def add(self, family: Family) -> Family:
        """Register `family` under its HF architecture name."""
        self.families[family.architecture] = family
        return family

    def find(self, config: HFConfig, where: str) -> Family:
        """The family of a config.json found at `where`; UserError if there is none."""
        names = config.get("architectures") or []
        for name in names:
            if name in self.families:
                return self.families[name]
        known = ", ".join(sorted(self.families))
        found = ", ".join(names) or "no architectures"
        raise UserError(f"{where}: config.json names {found}; supported are {known}")


REGISTRY = _Registry()


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Scalings of RoPE that are supported."""


def rope_theta(config: HFConfig) -> float:
    """RoPE's base from `rope_theta` or, as transformers 5 writes it, `rope_parameters`."""
    nested = config.get("rope_parameters") or {}
    return float(nested.get("rope_theta") or config.get("rope_theta") or 10000.0)


def rope_type(config: HFConfig) -> str:
    """RoPE's scaling; UserError if it is not supported."""
    kind = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UserError(
            f"config.json: rope_type {kind!r} is not supported; {', '.join(ROPE_TYPES)} are: "
            "use another model"
        )
    return str(kind)


def dense_args(config: HFConfig) -> dict[str, Any]:
    """Megatron arguments that all pre-norm RMSNorm + SwiGLU decoders share.

    UserError for a config that the layers cannot express.
    """
    rope_type(config)
    heads = config["num_attention_heads"]
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"config.json: hidden_act={config['hidden_act']!r} is not supported (silu is): "
            "use another model"
        )
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
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


ATTENTION = "decoder.layers.{i}.self_attention."
MLP = "decoder.layers.{i}.mlp."
HF_LAYER = "model.layers.{i}."
HF_ATTENTION = HF_LAYER + "self_attn."

DENSE_ROWS = (
    row("embedding.word_embeddings.weight", "model.embed_tokens.weight", layout=VOCABULARY),
    row("decoder.layers.{i}.input_layernorm.weight", HF_LAYER + "input_layernorm.weight"),
    row(
        ATTENTION + "linear_qkv.weight",
        *(HF_ATTENTION + f"{x}_proj.weight" for x in "qkv"),
        layout=QKV,
    ),
    row(
        ATTENTION + "linear_qkv.bias",
        *(HF_ATTENTION + f"{x}_proj.bias" for x in "qkv"),
        layout=QKV,
    ),
    row(ATTENTION + "q_layernorm.weight", HF_ATTENTION + "q_norm.weight"),
    row(ATTENTION + "k_layernorm.weight", HF_ATTENTION + "k_norm.weight"),
    row(ATTENTION + "linear_proj.weight", HF_ATTENTION + "o_proj.weight"),
    row(ATTENTION + "linear_proj.bias", HF_ATTENTION + "o_proj.bias"),
    row(
        "decoder.layers.{i}.pre_mlp_layernorm.weight", HF_LAYER + "post_attention_layernorm.weight"
    ),
    row(
        MLP + "linear_fc1.weight",
        HF_LAYER + "mlp.gate_proj.weight",
        HF_LAYER + "mlp.up_proj.weight",
        layout=GATE_UP,
    ),
    row(
        MLP + "linear_fc1.bias",
        HF_LAYER + "mlp.gate_proj.bias",
        HF_LAYER + "mlp.up_proj.bias",
        layout=GATE_UP,
    ),
    row(MLP + "linear_fc2.weight", HF_LAYER + "mlp.down_proj.weight"),
    row(MLP + "linear_fc2.bias", HF_LAYER + "mlp.down_proj.bias"),
    row("decoder.final_layernorm.weight", "model.norm.weight"),
    row("output_layer.weight", "lm_head.weight", layout=VOCABULARY),
)
"""Rows of the Llama-like decoders that transformers writes."""
