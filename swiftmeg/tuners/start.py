"""Training that starts from a PEFT folder: what its adapters are, before Megatron is there."""

import re
from pathlib import Path
from typing import Any

from swiftmeg.args.adapter_config import AdapterConfig
from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel
from swiftmeg.tuners.peft_format import Factors, HFAdapters
from swiftmeg.tuners.peft_reader import read_adapters
from swiftmeg.tuners.peft_writer import shortest
from swiftmeg.tuners.tables import settle_tables


def start_from(args: Any, sources: dict[str, str], model: HFModel) -> HFAdapters | None:
    """Read the folder that --adapters names, and set the flags that it decides.

    UserError if there is more than one folder, if it is not of this model, if it holds what cannot
    be trained on, or if a flag that was given disagrees with it.
    """
    if not args.adapters:
        return None
    if len(args.adapters) > 1:
        raise UserError(f"--adapters {' '.join(args.adapters)}: training starts from one: name one")
    (named,) = args.adapters
    for flag, wrong in (("train_type lora", not args.is_lora), ("adapter_load", args.adapter_load)):
        if wrong:
            needs = "needs" if flag.startswith("train_type") else "cannot be used with"
            raise UserError(f"--adapters {named} {needs} --{flag}: change one")
    config, adapters = read_adapters(Path(named).expanduser(), model)
    _refuse_untrainable(named, config, adapters, model)
    for name, value in _flags(config, adapters, model).items():
        if sources[name] == "flag" and getattr(args, name) != value:
            raise UserError(
                f"--{name} {getattr(args, name)} contradicts --adapters {named}, which says "
                f"{value}: drop it"
            )
        setattr(args, name, value)
        sources[name] = "the adapter"
    return adapters


def _refuse_untrainable(
    named: str, config: AdapterConfig, adapters: HFAdapters, model: HFModel
) -> None:
    """UserError for what can be merged alone."""
    settled = settle_tables(config, adapters, model)
    found = None
    if settled.config["vocab_size"] != model.config["vocab_size"]:
        found = f"has {settled.config['vocab_size']} rows for tokens, the model another number"
    elif settled is not model:
        found = "changes one of the tied embedding and head alone"
    elif adapters.tokens:
        found = f"trains single rows (trainable_token_indices) of {', '.join(adapters.tokens)}"
    elif adapters.added:
        found = "has biases of its own (lora_bias true)"
    elif config.bias == "lora_only":
        found = "has trained the biases of its own modules alone (bias lora_only)"
    elif config.start == "mica":
        found = "was made with init_lora_weights mica, which keeps every lora_B as it is"
    elif own := sorted(adapters.trained.keys() & adapters.factors.keys()):
        found = f"stores the base of {', '.join(own)}"
    if found:
        raise UserError(
            f"--adapters {named} {found}: training cannot start from that: merge it by swift "
            "export --merge_lora true and train the result"
        )


def _flags(config: AdapterConfig, adapters: HFAdapters, model: HFModel) -> dict[str, Any]:
    rows = model.family.plan(model.config)
    every = {_module(row.mcore) for row in rows}
    adapted: dict[str, Factors] = {}
    for row in rows:
        factors = [adapters.factors[name] for name in row.hf if name in adapters.factors]
        for each in factors:
            first = adapted.setdefault(_module(row.mcore), each)
            if (first.rank, first.alpha) != (each.rank, each.alpha):
                raise UserError(
                    f"the adapters of {', '.join(row.hf)} differ in rank or alpha, but are one in "
                    "Megatron: merge them by swift export --merge_lora true"
                )
    whole = {
        _module(row.mcore)
        for row in rows
        if row.mcore.endswith("weight") and any(name in adapters.trained for name in row.hf)
    }
    ranks = {name: each.rank for name, each in adapted.items()}
    alphas = {name: each.alpha for name, each in adapted.items()}
    return {
        "lora_rank": config.rank,
        "init_lora_weights": config.start,
        "lora_alpha": config.alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != config.rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != config.alpha},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_bias": config.bias,
        "target_modules": shortest(set(adapted), every),
        "modules_to_save": shortest(whole, every),
    }


def _module(parameter: str) -> str:
    """The module of a parameter; an expert's number is part of the parameter's name."""
    return re.sub(r"\.(weight|bias|expert_bias)\d*$", "", parameter)
