"""Training that starts from a PEFT folder: what its adapters are, before Megatron is there."""

import re
from pathlib import Path
from typing import Any

from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel
from swiftmeg.tuners.peft_format import (
    HFAdapters,
    read_folder,
    shortest,
    to_adapters,
)


def start_from(args: Any, sources: dict[str, str], model: HFModel) -> HFAdapters | None:
    """Read the folder that --adapters names, and set the flags that it decides.

    UserError if there is more than one folder, if it is not of this model, or if a flag that was
    given disagrees with it.
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
    config, tensors = read_folder(Path(named).expanduser())
    adapters = to_adapters(config, tensors, model)
    for name, value in _flags(config, adapters, model).items():
        if sources[name] == "flag" and getattr(args, name) != value:
            raise UserError(
                f"--{name} {getattr(args, name)} contradicts --adapters {named}, which says "
                f"{value}: drop it"
            )
        setattr(args, name, value)
        sources[name] = "the adapter"
    return adapters


def _flags(config: dict[str, Any], adapters: HFAdapters, model: HFModel) -> dict[str, Any]:
    if config.get("bias", "none") not in ("none", "all"):
        raise UserError(f"the adapter's bias {config['bias']!r} is not supported: none and all are")
    rows = model.family.plan(model.config)
    every = {_module(row.mcore) for row in rows}
    adapted = {_module(row.mcore) for row in rows if any(n in adapters.factors for n in row.hf)}
    whole = {
        _module(row.mcore)
        for row in rows
        if row.mcore.endswith("weight") and any(name in adapters.trained for name in row.hf)
    }
    return {
        "lora_rank": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "lora_bias": config.get("bias", "none"),
        "target_modules": shortest(adapted, every),
        "modules_to_save": shortest(whole, every),
    }


def _module(parameter: str) -> str:
    """The module of a parameter; an expert's number is part of the parameter's name."""
    return re.sub(r"\.(weight|bias|expert_bias)\d*$", "", parameter)
