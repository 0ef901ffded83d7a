"""PEFT folders, adapter_config.json and adapter_model.safetensors: read and written. No Megatron.

transformers 5 holds a layer's routed experts as two three-dimensional parameters. PEFT adapts such
a parameter (`target_parameters`) with the factors of all experts in one pair of matrices: A lists
expert after expert, in B the expert changes fastest. In a model with such experts PEFT takes every
target module that is called like a published expert's layer for those experts, so the dense layers
and shared experts of that name are listed by their parameters, too.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swiftmeg.args.tuner import LoraArguments
from swiftmeg.errors import UserError
from swiftmeg.json_files import read_object
from swiftmeg.models.family import Row
from swiftmeg.models.hf import HFModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EMBEDDING = "embed_tokens"
_LIKE_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate", "router", "w1", "w2", "w3")
"""Last parts of names that PEFT takes for an expert's in a model with routed experts, and of
routers, which are no linear layers there."""

Pair = tuple[Tensor, Tensor]
"""Factors A and B."""


@dataclass
class HFAdapters:
    """Whole tensors on the CPU, by the names of the HF weights that they change or replace."""

    factors: dict[str, Pair] = field(default_factory=dict)
    """Weight name -> A [rank, in] and B [out, rank]; for a table A [rank, rows], B [size, rank]."""
    trained: dict[str, Tensor] = field(default_factory=dict)
    """Weights and biases that are trained whole."""


def weight_names(model: HFModel) -> set[str]:
    """Every weight of a model, as published."""
    return {name for row in model.family.plan(model.config) for name in row.hf}


def _live(name: str) -> str:
    """The name that a published weight has in transformers' model."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def _experts(model: HFModel) -> dict[str, list[Row]]:
    """transformers' stacked parameters, and the rows of the experts in each, in order."""
    stacks: dict[str, list[Row]] = defaultdict(list)
    for row in model.family.plan(model.config):
        if row.stack is not None:
            stacks[row.stack].append(row)
    return {name: sorted(rows, key=lambda row: row.expert) for name, rows in stacks.items()}


def write_folder(
    folder: Path, adapters: HFAdapters, args: LoraArguments, base: str | None, model: HFModel
) -> None:
    """Write what `to_hf_form` gathered from `model`; `base` is the folder of its weights."""
    tensors: dict[str, Tensor] = {}
    stacks, factors = _experts(model), dict(adapters.factors)
    modules, parameters = set(), set()
    for name, rows in stacks.items():
        if rows[0].hf[0] in factors:
            pairs = [[factors.pop(part) for part in row.hf] for row in rows]
            tensors |= _stack(_wrapper(name, adapters, stacks), pairs)
            parameters.add(name)
    for name, (a, b) in factors.items():
        module = _live(name).removesuffix(".weight")
        last = module.rpartition(".")[2]
        if stacks and last in _LIKE_EXPERTS:
            parameters.add(_live(name))
        else:
            modules.add(module)
        kind, end = ("embedding_", "") if last == _EMBEDDING else ("", ".weight")
        tensors |= {f"{module}.lora_{kind}{x}{end}": y for x, y in (("A", a), ("B", b))}
    for name, tensor in adapters.trained.items():
        module, _, kind = _live(name).rpartition(".")
        tensors[f"{module}.{'base_layer.' if module in modules else ''}{kind}"] = tensor
    tied = bool(model.config.get("tie_word_embeddings"))
    if tied:
        for name in [name for name in tensors if name.endswith(f"{_EMBEDDING}.weight")]:
            tensors["lm_head.weight"] = tensors[name]  # PEFT reads the tied head, too
    folder.mkdir(parents=True, exist_ok=True)
    content = {_PREFIX + name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})
    config = _config(adapters, args, base, modules, parameters, model)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _wrapper(stack: str, adapters: HFAdapters, stacks: dict[str, list[Row]]) -> str:
    """Where PEFT keeps the factors of a stacked parameter: of two, the first is wrapped inside."""
    module, _, last = stack.rpartition(".")
    other = f"{module}.{'down_proj' if last == 'gate_up_proj' else 'gate_up_proj'}"
    both = other in stacks and stacks[other][0].hf[0] in adapters.factors
    return f"{module}.base_layer" if both and last == "gate_up_proj" else module


def _stack(place: str, experts: list[list[Pair]]) -> dict[str, Tensor]:
    """PEFT's pair for all experts; an expert's layers, such as gate and up, share their A."""
    a = torch.cat([parts[0][0] for parts in experts])  # [experts * rank, in]
    b = torch.stack([torch.cat([b for _, b in parts]) for parts in experts], dim=-1)
    return {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b.flatten(1)}


def _unstack(rows: list[Row], pair: dict[str, Tensor]) -> Iterator[tuple[str, Pair]]:
    """Each expert's factors from PEFT's pair for all; inverse of `_stack`."""
    a = pair["A"].unflatten(0, (len(rows), -1))
    b = pair["B"].unflatten(1, (-1, len(rows))).movedim(-1, 0)
    for row, mine, whole in zip(rows, a, b, strict=True):
        for name, part in zip(row.hf, whole.chunk(len(row.hf)), strict=True):
            yield name, (mine, part.contiguous())


def _config(
    adapters: HFAdapters,
    args: LoraArguments,
    base: str | None,
    modules: set[str],
    parameters: set[str],
    model: HFModel,
) -> dict[str, Any]:
    from peft import LoraConfig

    every = {_live(name) for name in weight_names(model)} | _experts(model).keys()
    saved = {_live(name).rpartition(".")[0] for name in adapters.trained if name.endswith("weight")}
    tied = bool(model.config.get("tie_word_embeddings"))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        # Dropout is for training; PEFT refuses it beside parameters, which it changes whole.
        lora_dropout=0.0 if parameters else args.lora_dropout,
        bias=args.lora_bias,
        use_rslora=args.use_rslora,
        target_modules=shortest(modules, {name.removesuffix(".weight") for name in every}),
        target_parameters=_from_layer(parameters, every) or None,
        modules_to_save=sorted(saved) or None,
        ensure_weight_tying=tied and any(name.endswith(_EMBEDDING) for name in saved),
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"] or [])
    return {name: value for name, value in config.items() if not isinstance(value, set)}


def shortest(modules: set[str], every: set[str]) -> list[str]:
    """The last parts of the modules' names, or whole names where those would fit others too."""
    ends = {module.rpartition(".")[2] for module in modules}
    fitting = {name for name in every if name.rpartition(".")[2] in ends}
    return sorted(ends if fitting == modules else modules)


def _from_layer(parameters: set[str], every: set[str]) -> list[str]:
    """The names without the layer's, or whole names where those would fit others too."""

    def inside(name: str) -> str:
        return re.sub(r".*\.layers\.\d+\.", "", name)

    ends = {inside(name) for name in parameters}
    fitting = {name for name in every if inside(name) in ends}
    return sorted(ends if fitting == parameters else parameters)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a PEFT folder, names without PEFT's prefix.

    UserError for what is missing, broken or no LoRA.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"--adapters {folder}: there is no {CONFIG}: name a folder that PEFT wrote")
    config = read_object(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"--adapters {folder}: peft_type {config.get('peft_type')}: LORA is known")
    for name in ("use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise UserError(
                f"--adapters {folder}: {name} {config[name]} is not supported: merge it with PEFT"
            )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error})") from None
    return config, {key.removeprefix(_PREFIX): value for key, value in tensors.items()}


def to_adapters(config: dict[str, Any], tensors: dict[str, Tensor], model: HFModel) -> HFAdapters:
    """A PEFT folder's tensors by the HF weights that they change.

    UserError for tensors that belong to no weight of the model.
    """
    published = {_live(name): name for name in weight_names(model)}
    published |= {name: name for name in published.values()}
    stacks, found = _experts(model), HFAdapters()
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        name = key.replace(".base_layer.", ".")
        if match := re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key):
            pairs[match[1]][match[2]] = tensor
        elif name in published:
            found.trained[published[name]] = tensor
        elif name != "lm_head.weight" or not config.get("ensure_weight_tying"):
            unknown.append(key)
    for place, pair in pairs.items():
        module = place.removesuffix(".base_layer")
        stack = f"{module}.{'gate_up_proj' if _is_first(place, pairs, config) else 'down_proj'}"
        if f"{module}.weight" in published:
            found.factors[published[f"{module}.weight"]] = (pair["A"], pair["B"])
        elif stack in stacks:
            found.factors.update(_unstack(stacks[stack], pair))
        else:
            unknown.append(f"{place}.lora_A")
    if unknown:
        raise UserError(f"the adapter is not of this model, which has no {', '.join(unknown[:5])}")
    return found


def _is_first(place: str, pairs: Any, config: dict[str, Any]) -> bool:
    """PEFT nests the wrappers of two parameters, the first inside; one alone is not nested."""
    if place.endswith(".base_layer") or f"{place}.base_layer" in pairs:
        return place.endswith(".base_layer")
    return any(name.endswith("gate_up_proj") for name in config.get("target_parameters") or ())


def refuse_tied(adapters: HFAdapters) -> None:
    """UserError for an adapter of the embedding or head of a model where they are one weight."""
    for name in adapters.factors:
        if name.removesuffix(".weight").endswith(("embed_tokens", "lm_head")):
            raise UserError(
                f"the adapter changes {name} alone, but the model's embedding is its head too: it "
                "cannot be merged"
            )
