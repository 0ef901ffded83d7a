"""PEFT folders, adapter_config.json and adapter_model.safetensors: read and written. No Megatron.

transformers 5 holds a layer's routed experts as two three-dimensional parameters. PEFT adapts such
a parameter (`target_parameters`) with the factors of all experts in one pair of matrices: A lists
expert after expert, in B the expert changes fastest.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swiftmeg.args.tuner import LoraArguments
from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"} | {
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "w2": "down_proj",
}
"""A published expert's tensors -> the parameters in which transformers stacks them."""
_EMBEDDINGS = ("embed_tokens",)
_ROUTERS = (".mlp.gate", ".block_sparse_moe.gate")


@dataclass
class HFAdapters:
    """Whole tensors on the CPU, by the names of the HF weights that they change or replace."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Weight name -> A [rank, in] and B [out, rank]; for a table A [rank, rows], B [size, rank]."""
    trained: dict[str, Tensor] = field(default_factory=dict)
    """Weights and biases that are trained whole."""


def write_folder(
    folder: Path, adapters: HFAdapters, args: LoraArguments, base: str | None, model: HFModel
) -> None:
    """Write what `to_hf_form` gathered from `model`; `base` is the folder of its weights."""
    tensors: dict[str, Tensor] = {}
    experts: dict[str, dict[str, dict[int, tuple[Tensor, Tensor]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    modules, parameters = set(), set()
    for name, (a, b) in adapters.factors.items():
        if match := _EXPERT.fullmatch(name):
            stacked = experts[match[1]][_STACKED[match[3]]]
            number = int(match[2])
            if number in stacked:  # gate, then up: one A, and the rows of both in B
                b = torch.cat([stacked[number][1], b])
            stacked[number] = (a, b)
            continue
        module = name.removesuffix(".weight")
        if module.endswith(_ROUTERS):
            parameters.add(_from_layer(name))
        else:
            modules.add(module)
        kind = "lora_embedding_" if module.endswith(_EMBEDDINGS) else "lora_"
        dot = "" if module.endswith(_EMBEDDINGS) else ".weight"
        tensors |= {f"{_PREFIX}{module}.{kind}A{dot}": a, f"{_PREFIX}{module}.{kind}B{dot}": b}
    for module, stacks in experts.items():
        inner = "base_layer." if len(stacks) > 1 else ""
        for parameter, stacked in stacks.items():
            place = f"{module}.{inner if parameter == 'gate_up_proj' else ''}"
            tensors |= _stack(f"{_PREFIX}{place}", [stacked[e] for e in sorted(stacked)])
            parameters.add(_from_layer(f"{module}.{parameter}"))
    for name, tensor in adapters.trained.items():
        module, _, kind = name.rpartition(".")
        wrapped = "base_layer." if module in modules else ""
        tensors[f"{_PREFIX}{module}.{wrapped}{kind}"] = tensor
    if model.config.get("tie_word_embeddings"):
        for name in [name for name in tensors if name.endswith("embed_tokens.weight")]:
            tensors[f"{_PREFIX}lm_head.weight"] = tensors[name]  # PEFT reads the tied head, too
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = _config(adapters, args, base, modules, parameters, model)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def weight_names(model: HFModel) -> set[str]:
    """Every weight of a model, as published."""
    return {name for row in model.family.plan(model.config) for name in row.hf}


def _from_layer(name: str) -> str:
    """The part of a parameter's name that is the same in every layer."""
    return re.sub(r".*\.layers\.\d+\.", "", name)


def _stack(place: str, experts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """PEFT's pair for a parameter with an axis of experts, from each expert's factors."""
    a = torch.cat([each for each, _ in experts])  # [experts * rank, in]
    b = torch.stack([each for _, each in experts], dim=-1)  # [out, rank, experts]
    return {f"{place}lora_A.weight": a, f"{place}lora_B.weight": b.flatten(1)}


def _config(
    adapters: HFAdapters,
    args: LoraArguments,
    base: str | None,
    modules: set[str],
    parameters: set[str],
    model: HFModel,
) -> dict[str, Any]:
    from peft import LoraConfig

    names = (name for name in weight_names(model) if not _EXPERT.fullmatch(name))
    every = {name.removesuffix(".weight") for name in names}
    tied = bool(model.config.get("tie_word_embeddings"))
    saved = {name.rpartition(".")[0] for name in adapters.trained if name.endswith(".weight")}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        # Dropout is for training; PEFT refuses it beside stacked experts, which it computes whole.
        lora_dropout=0.0 if parameters else args.lora_dropout,
        bias=args.lora_bias,
        use_rslora=args.use_rslora,
        target_modules=shortest(modules, every),
        target_parameters=sorted(parameters) or None,
        modules_to_save=sorted(saved) or None,
        ensure_weight_tying=tied and any(name.endswith(_EMBEDDINGS) for name in saved),
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"] or [])
    return {name: value for name, value in config.items() if not isinstance(value, set)}


def shortest(modules: set[str], every: set[str]) -> list[str]:
    """The last parts of the modules' names, or whole names where those would fit others too."""
    ends = {module.rpartition(".")[2] for module in modules}
    fitting = {name for name in every if name.rpartition(".")[2] in ends}
    return sorted(ends if fitting == modules else modules)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a PEFT folder, names without PEFT's prefix.

    UserError for what is missing, broken or no LoRA.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise UserError(
            f"--adapters {folder}: there is no {CONFIG}: name a folder that PEFT wrote"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / CONFIG} is not JSON ({error})") from None
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


def to_adapters(config: dict[str, Any], tensors: dict[str, Tensor], names: set[str]) -> HFAdapters:
    """A PEFT folder's tensors by the HF weights that they change; `names` are all of the model's.

    UserError for tensors that belong to no weight of the model.
    """
    found = HFAdapters()
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key):
            factors[match[1]][match[2]] = tensor
        elif (name := key.replace(".base_layer.", ".")) in names:
            found.trained[name] = tensor
        elif name == "lm_head.weight" and config.get("ensure_weight_tying"):
            continue
        else:
            unknown.append(key)
    for place, pair in factors.items():
        module = place.removesuffix(".base_layer")
        if f"{module}.weight" in names:
            found.factors[f"{module}.weight"] = (pair["A"], pair["B"])
        elif experts := _experts_of(module, names):
            parameter = "gate_up_proj" if _is_gate_up(place, factors, config) else "down_proj"
            found.factors |= _unstack(module, parameter, experts, pair)
        else:
            unknown.append(f"{place}.lora_A")
    if unknown:
        raise UserError(f"the adapter is not of this model, which has no {', '.join(unknown[:5])}")
    return found


def refuse_tied(adapters: HFAdapters) -> None:
    """UserError for an adapter of the embedding or head of a model where they are one weight."""
    for name in adapters.factors:
        if name.removesuffix(".weight").endswith(("embed_tokens", "lm_head")):
            raise UserError(
                f"the adapter changes {name} alone, but the model's embedding is its head too: it "
                "cannot be merged"
            )


def _experts_of(module: str, names: set[str]) -> dict[int, set[str]]:
    """The experts under `module`, and the last parts of their tensors' names."""
    experts: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if (match := _EXPERT.fullmatch(name)) and match[1] == module:
            experts[int(match[2])].add(match[3])
    return experts


def _is_gate_up(place: str, factors: Any, config: dict[str, Any]) -> bool:
    """PEFT nests the wrappers of two parameters, the first inside; one alone is not nested."""
    if place.endswith(".base_layer") or f"{place}.base_layer" in factors:
        return place.endswith(".base_layer")
    return any(name.endswith("gate_up_proj") for name in config.get("target_parameters") or ())


def _unstack(
    module: str, parameter: str, experts: dict[int, set[str]], pair: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each expert's factors from PEFT's pair for all; inverse of `_stack`."""
    count = len(experts)
    a = pair["A"].unflatten(0, (count, -1))
    b = pair["B"].unflatten(1, (-1, count)).movedim(-1, 0)
    made = {}
    for expert, ends in experts.items():
        mine = [end for end in _STACKED if end in ends and _STACKED[end] == parameter]
        for end, part in zip(mine, b[expert].chunk(len(mine)), strict=True):
            made[f"{module}.{expert}.{end}.weight"] = (a[expert], part.contiguous())
    return made
