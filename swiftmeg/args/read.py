"""Reading the arguments of a training command and the model that they name."""

import dataclasses
import math
from typing import Any

from swiftmeg import platform
from swiftmeg.args.architecture import OVERRIDES, with_overrides
from swiftmeg.args.commands import RlhfArguments
from swiftmeg.args.flags import parse_flags
from swiftmeg.args.model import DataArguments
from swiftmeg.args.moe import complete_experts
from swiftmeg.args.plugins import load_plugins
from swiftmeg.args.preference_rules import settle_preference
from swiftmeg.args.resolve import read_args_file, resolve
from swiftmeg.args.tuner import named_by_peft, recorded
from swiftmeg.args.unsupported import check_planned
from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel, read_model
from swiftmeg.models.vocabulary import read_tokens, with_new_tokens

INHERITED = (
    *("model", "torch_dtype", "template", "system", "new_special_tokens"),
    *OVERRIDES,
)
"""What a checkpoint's args.json says about the model rather than about the run that wrote it."""


RATES = ("lr", "min_lr")
"""What a run takes from the one that it continues, too."""


def inherited(
    folder: str | None, given: dict[str, Any], continues: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """The resolver's layer for the args.json of `folder`, as far as `given` asks for it.

    `continues`: the command goes on with the run that wrote it.
    """
    if folder is None or not given.get("load_args", True):
        return []
    saved = read_args_file(folder)
    names = list(INHERITED)
    if continues and not given.get("finetune"):
        names += RATES
    if given.get("load_data_args"):
        names += [field.name for field in dataclasses.fields(DataArguments)]
    return [("args.json", {name: saved[name] for name in names if name in saved})]


def read_command(
    cls: type[Any], argv: list[str], prog: str, checkpoint: str, adapters: str
) -> tuple[Any, dict[str, str], HFModel]:
    """Parse and resolve `argv`; returns the arguments, their sources and the model.

    `checkpoint` and `adapters` are the flags that name a Megatron checkpoint and a LoRA checkpoint.
    """
    given = parse_flags(cls, argv, prog)
    layers: list[tuple[str, dict[str, Any]]] = []
    folder = given.get(checkpoint)
    if given.get(adapters):
        named = given[adapters] if isinstance(given[adapters], str) else given[adapters][0]
        layers += recorded(adapters, named, given, checkpoint) + inherited(named, given, True)
        folder = folder or layers[0][1][checkpoint]
    elif given.get("adapters"):
        layers += [("the adapter", named_by_peft(given["adapters"][0]))]
    full = given.get("train_type", "full") == "full" and not layers
    args, sources = resolve(cls, given, layers + inherited(folder, given, full))
    check_planned(args)
    if isinstance(args, RlhfArguments):
        settle_preference(args, sources)
    load_plugins(args)
    return args, sources, read_named_model(args)


def read_named_model(args: Any) -> HFModel:
    """The model that --model or the checkpoint's args.json names."""
    if args.model is None:
        raise UserError("--model is needed: name a Hugging Face folder or hub id")
    model = read_model(
        args.model,
        use_hf=getattr(args, "use_hf", False),
        trust_remote_code=args.trust_remote_code,
        revision=args.model_revision,
    )
    if tokens := read_tokens(args.new_special_tokens):
        model = with_new_tokens(model, tokens)
        args.new_special_tokens = tokens  # a file may be gone when args.json is read
    return with_overrides(model, args)


def read_training_arguments(
    cls: type[Any], argv: list[str], prog: str
) -> tuple[Any, dict[str, str], HFModel]:
    """Parse, resolve and complete `argv`; returns the arguments, their sources and the model."""
    args, sources, model = read_command(cls, argv, prog, "load", "adapter_load")
    args.model = model.named
    _choose_dtype(args, sources, model)
    if args.ddp_timeout is not None:
        args.distributed_timeout_minutes = max(1, math.ceil(args.ddp_timeout / 60))
        sources["distributed_timeout_minutes"] = "--ddp_timeout"
    complete_experts(args, sources, model)
    return args, sources, model


def _choose_dtype(args: Any, sources: dict[str, str], model: HFModel) -> None:
    """--fp16 and --bf16 decide, then --torch_dtype; CPUs train in float32 unless told otherwise."""
    for flag, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        if getattr(args, flag) and args.torch_dtype not in (None, dtype):
            if sources["torch_dtype"] == "flag":
                raise UserError(
                    f"--{flag} true contradicts --torch_dtype {args.torch_dtype}: drop one"
                )
        if getattr(args, flag):
            args.torch_dtype, sources["torch_dtype"] = dtype, f"--{flag}"
    if sources["torch_dtype"] in ("default", "args.json"):
        if not platform.has_cuda() and not args.dry_run:
            args.torch_dtype, sources["torch_dtype"] = "float32", "no GPU"
        elif args.torch_dtype is None:
            args.torch_dtype, sources["torch_dtype"] = model.dtype, "config.json"
    for flag, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        if getattr(args, flag) is None:
            setattr(args, flag, args.torch_dtype == dtype)
