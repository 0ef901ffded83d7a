"""PEFT folders, adapter_config.json and adapter_model.safetensors: written. No Megatron."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from swiftmeg.args.adapter_config import CONFIG
from swiftmeg.args.tuner import LoraArguments
from swiftmeg.models.family import Row
from swiftmeg.models.hf import HFModel
from swiftmeg.tuners.peft_format import (
    EMBEDDING,
    PREFIX,
    WEIGHTS,
    Factors,
    HFAdapters,
    expert_stacks,
    live_name,
    weight_names,
)

_LIKE_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate", "router", "w1", "w2", "w3")
"""Last parts of names that PEFT takes for an expert's in a model with routed experts, and of
routers, which are no linear layers there."""


def write_folder(
    folder: Path, adapters: HFAdapters, args: LoraArguments, base: str | None, model: HFModel
) -> None:
    """Write what `to_hf_form` gathered from `model`; `base` is the folder of its weights."""
    tensors: dict[str, Tensor] = {}
    stacks, factors = expert_stacks(model), dict(adapters.factors)
    modules: dict[str, Factors] = {}
    parameters: dict[str, Factors] = {}
    for name, rows in stacks.items():
        if rows[0].hf[0] in factors:
            experts = [[factors.pop(part) for part in row.hf] for row in rows]
            tensors |= _stack(_wrapper(name, adapters, stacks), experts)
            parameters[name] = experts[0][0]
    for name, each in factors.items():
        module = live_name(name).removesuffix(".weight")
        last = module.rpartition(".")[2]
        if stacks and last in _LIKE_EXPERTS:
            parameters[live_name(name)] = each
        else:
            modules[module] = each
        kind, end = ("embedding_", "") if last == EMBEDDING else ("", ".weight")
        tensors |= {f"{module}.lora_{kind}A{end}": each.a, f"{module}.lora_{kind}B{end}": each.b}
        if each.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = each.magnitude
    for name, tensor in adapters.trained.items():
        module, _, kind = live_name(name).rpartition(".")
        tensors[f"{module}.{'base_layer.' if module in modules else ''}{kind}"] = tensor
    if model.config.get("tie_word_embeddings"):
        for name in [name for name in tensors if name.endswith(f"{EMBEDDING}.weight")]:
            tensors["lm_head.weight"] = tensors[name]  # PEFT reads the tied head, too
    folder.mkdir(parents=True, exist_ok=True)
    content = {PREFIX + name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})
    config = _config(adapters, args, base, modules, parameters, model)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _wrapper(stack: str, adapters: HFAdapters, stacks: dict[str, list[Row]]) -> str:
    """Where PEFT keeps the factors of a stacked parameter: of two, the first is wrapped inside."""
    module, _, last = stack.rpartition(".")
    other = f"{module}.{'down_proj' if last == 'gate_up_proj' else 'gate_up_proj'}"
    both = other in stacks and stacks[other][0].hf[0] in adapters.factors
    return f"{module}.base_layer" if both and last == "gate_up_proj" else module


def _stack(place: str, experts: list[list[Factors]]) -> dict[str, Tensor]:
    """PEFT's pair for all experts; an expert's layers, such as gate and up, share their A."""
    a = torch.cat([parts[0].a for parts in experts])  # [experts * rank, in]
    b = torch.stack([torch.cat([part.b for part in parts]) for parts in experts], dim=-1)
    return {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b.flatten(1)}


def _config(
    adapters: HFAdapters,
    args: LoraArguments,
    base: str | None,
    modules: dict[str, Factors],
    parameters: dict[str, Factors],
    model: HFModel,
) -> dict[str, Any]:
    from peft import LoraConfig

    every = {live_name(name) for name in weight_names(model)} | expert_stacks(model).keys()
    whole = [live_name(name) for name in adapters.trained if name.endswith("weight")]
    saved = {name.rpartition(".")[0] for name in whole}
    tied = bool(model.config.get("tie_word_embeddings"))
    both = modules | parameters
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        rank_pattern=_pattern({name: each.rank for name, each in both.items()}, args.lora_rank),
        alpha_pattern=_pattern({name: each.alpha for name, each in both.items()}, args.lora_alpha),
        # Dropout is for training; PEFT refuses it beside parameters, which it changes whole.
        lora_dropout=0.0 if parameters else args.lora_dropout,
        bias=args.lora_bias,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        init_lora_weights=_start(args),
        target_modules=shortest(set(modules), {name.removesuffix(".weight") for name in every}),
        target_parameters=_from_layer(set(parameters), every) or None,
        modules_to_save=sorted(saved) or None,
        ensure_weight_tying=tied and any(name.endswith(EMBEDDING) for name in saved),
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"] or [])
    return {name: value for name, value in config.items() if not isinstance(value, set)}


def _start(args: LoraArguments) -> bool | str:
    """How the adapters began, as PEFT says it."""
    return True if args.init_lora_weights == "true" else args.init_lora_weights


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """PEFT's pattern for what differs from `default`: by the last part of names where it can be."""
    ends: dict[str, set[Any]] = defaultdict(set)
    for name, value in values.items():
        ends[_last(name)].add(value)
    return {
        _last(name) if len(ends[_last(name)]) == 1 else name: value
        for name, value in values.items()
        if value != default
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


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
