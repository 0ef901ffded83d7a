"""What a model family is: Megatron arguments from config.json, and weight rows used both ways.

A row states one fact, "these HF tensors are that Megatron parameter in this layout", and serves
loading and saving alike. Parameter names are Megatron's own with global layer and expert numbers,
in the spelling of unfused layers: norms are `input_layernorm` and `pre_mlp_layernorm` also where
TransformerEngine keeps them inside the following linear; experts are `linear_fc1.weight{e}`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from swiftmeg.errors import UserError
from swiftmeg.models.layout import COPY, Layout

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
"""Megatron's names of the embedding and of the output layer, which may be tied to it."""

HFConfig = dict[str, Any]
"""A checkpoint's config.json."""


@dataclass(frozen=True)
class Row:
    """HF tensors `hf` are Megatron parameter `mcore`, joined by `layout`.

    `{i}` stands for a layer number, `{e}` for an expert's, and `{n}` in HF names for the layer
    number that follows the decoder's layers (multi-token prediction).
    """

    mcore: str
    hf: tuple[str, ...]
    layout: Layout = COPY
    fp32: bool = False
    """The HF tensor is float32 whatever the dtype of the others."""
    copies: tuple[str, ...] = ()
    """HF tensors that repeat the only one in `hf`; they are written, and need not be there."""
    stack: str | None = None
    """An HF tensor [experts, ...] that holds this row's joined tensors, where `hf` are not; always
    where it is all of `hf`."""

    def at(self, **numbers: int) -> "Row":
        """The row with its placeholders filled: `at(i=3, e=7)`."""

        def fill(name: str) -> str:
            for letter, number in numbers.items():
                name = name.replace("{" + letter + "}", str(number))
            return name

        return dataclasses.replace(
            self,
            mcore=fill(self.mcore),
            hf=tuple(fill(name) for name in self.hf),
            stack=self.stack and fill(self.stack),
        )

    @property
    def is_slice(self) -> bool:
        """Whether the HF tensor holds all experts, in what is written too."""
        return self.hf == (self.stack,)

    @property
    def expert(self) -> int:
        """The expert's number at the end of the parameter's name."""
        return int(re.split(r"\D", self.mcore)[-1])

    def with_copies(self, layers: range) -> "Row":
        """The row with `{n}` in its copies filled by each of `layers`."""
        names = [name.replace("{n}", str(n)) for name in self.copies for n in layers]
        return dataclasses.replace(self, copies=tuple(names))


def row(mcore: str, *hf: str, layout: Layout = COPY, fp32: bool = False) -> Row:
    """Write a row without tuple brackets."""
    return Row(mcore, hf, layout, fp32)


@dataclass(frozen=True)
class Family:
    """One HF architecture.

    `to_args` maps config.json to Megatron arguments (names as in Megatron's namespace) and to the
    switches that Megatron lacks (`LayerSwitches` of models/arguments.py).
    `rows` lists every weight that a checkpoint of this family can have; rows whose Megatron
    parameter a configuration does not build (biases, tied heads, a dense layer's router) are left
    out by `plan`.
    """

    architecture: str
    to_args: Callable[[HFConfig], dict[str, Any]]
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    """Regular expressions of HF buffers that carry no weight."""
    config_class: str | None = None
    """transformers' model_type whose config class reads this family's config.json, for families
    that are published with code of their own."""
    adapt: Callable[[HFConfig], HFConfig] | None = None
    """Completes config.json before that class reads it."""
    predictions: str | None = None
    """Regular expression of the HF tensors of multi-token prediction modules."""

    def variant(
        self,
        architecture: str,
        to_args: Callable[[HFConfig], dict[str, Any]],
        rows: tuple[Row, ...] = (),
        **changes: Any,
    ) -> "Family":
        """A family with this one's rows, of which `rows` replace those of the same parameter."""
        by_name = {each.mcore: each for each in (*self.rows, *rows)}
        return dataclasses.replace(
            self,
            architecture=architecture,
            to_args=to_args,
            rows=tuple(by_name.values()),
            **changes,
        )

    def plan(self, config: HFConfig) -> list[Row]:
        """Every weight of a model with this config, layers and experts expanded."""
        return list(self._expand(config))

    def _expand(self, config: HFConfig) -> Iterator[Row]:
        built = self.to_args(config)
        decoder, predictions = built["num_layers"], built.get("mtp_num_layers") or 0
        for each in self.rows:
            if "{i}" not in each.mcore:
                layers = range(1)
                each = each.with_copies(range(decoder, decoder + predictions))
            elif each.mcore.startswith("mtp."):
                layers = range(predictions)
            else:
                layers = range(decoder)
            experts = range(built.get("num_experts") or 0) if "{e}" in each.mcore else range(1)
            for layer in layers:
                if is_built(each.mcore, built, layer):
                    here = each.at(i=layer, n=decoder + layer)
                    yield from (here.at(e=expert) for expert in experts)

    def is_prediction(self, name: str, config: HFConfig) -> bool:
        """True for an HF tensor of a multi-token prediction module."""
        if self.predictions is None:
            return False
        first, count = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 1
        numbers = "|".join(str(n) for n in range(first, first + count))
        return bool(re.fullmatch(self.predictions.replace("{n}", f"({numbers})"), name))

    def is_ignored(self, name: str) -> bool:
        """True for an HF tensor that is known to carry no weight."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


_OPTIONAL: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    (r".*\.(input|pre_mlp)_layernorm\.weight", lambda a: a.get("norm_before", True)),
    (r".*\.post_(self_attn|mlp)_layernorm\.weight", lambda a: a.get("norm_after")),
    (r"output_layer\.weight", lambda a: a["untie_embeddings_and_output_weights"]),
    (r".*linear_qkv\.weight", lambda a: not a.get("multi_latent_attention")),
    (r".*linear_qkv\.bias", lambda a: a.get("add_qkv_bias")),
    (r".*linear_proj\.bias", lambda a: a.get("attention_output_bias")),
    (r".*(linear_q_proj)\.weight", lambda a: _is_mla(a) and not a.get("q_lora_rank")),
    (r".*linear_q_(down|up)_proj\.weight", lambda a: _is_mla(a) and a.get("q_lora_rank")),
    (r".*linear_kv_(down|up)_proj\.weight|.*kv_layernorm\.weight", lambda a: _is_mla(a)),
    (
        r".*\.q_layernorm\.weight",
        lambda a: a.get("q_lora_rank") if _is_mla(a) else a.get("qk_layernorm"),
    ),
    (r".*\.k_layernorm\.weight", lambda a: not _is_mla(a) and a.get("qk_layernorm")),
    (r".*shared_experts\.gate_weight", lambda a: a.get("moe_shared_expert_gate")),
    (r".*shared_experts\..*", lambda a: a.get("moe_shared_expert_intermediate_size")),
    (r".*core_attention\.softmax_offset", lambda a: a.get("softmax_type") == "learnable"),
    (r".*experts\.linear_fc[12]\.bias.*|.*router\.bias", lambda a: a.get("expert_bias")),
    (r".*router\.expert_bias", lambda a: a.get("moe_router_enable_expert_bias")),
    (r".*linear_fc[12]\.bias", lambda a: a.get("mlp_bias")),
)
"""Which parameters, by name, exist only under which arguments; the first match decides."""


def _is_mla(args: dict[str, Any]) -> bool:
    return bool(args.get("multi_latent_attention"))


def is_built(mcore: str, args: dict[str, Any], layer: int) -> bool:
    """Whether a model with these arguments has parameter `mcore` in layer `layer`."""
    if ".mlp." in mcore and _is_expert_layer(mcore, args, layer) == (".mlp.linear_fc" in mcore):
        return False
    if ".self_attention." in mcore:
        if _is_linear_layer(mcore, args, layer) != bool(_LINEAR_ATTENTION.fullmatch(mcore)):
            return False
    for pattern, exists in _OPTIONAL:
        if re.fullmatch(pattern, mcore):
            return bool(exists(args))
    return True


def _is_expert_layer(mcore: str, args: dict[str, Any], layer: int) -> bool:
    """Whether the layer has experts; a prediction layer is like the last of the decoder."""
    if not args.get("num_experts"):
        return False
    return bool(args["moe_layer_freq"][-1 if mcore.startswith("mtp.") else layer])


_LINEAR_ATTENTION = re.compile(
    r".*\.self_attention\.(in_proj|conv1d|dt_bias|A_log|out_norm|out_proj)\b.*"
)


def _is_linear_layer(mcore: str, args: dict[str, Any], layer: int) -> bool:
    """Whether the layer has a gated delta net; a prediction layer has attention."""
    pattern = args.get("linear_attention_freq")
    return bool(pattern and pattern[layer] and not mcore.startswith("mtp."))


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
