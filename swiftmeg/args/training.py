"""Reading the arguments of a training command and the model that they name."""

from typing import Any

from swiftmeg import platform
from swiftmeg.args.parser import parse_flags
from swiftmeg.args.resolve import read_args_file, resolve
from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel, read_model

INHERITED = ("model", "torch_dtype", "template", "system", "trust_remote_code")
"""What a checkpoint's args.json says about the model rather than about the run that wrote it."""


def inherited(folder: str | None, load_args: bool) -> list[tuple[str, dict[str, Any]]]:
    """The resolver's layer for the args.json of `folder`."""
    if folder is None or not load_args:
        return []
    saved = read_args_file(folder)
    return [("args.json", {name: saved[name] for name in INHERITED if name in saved})]


def read_named_model(args: Any) -> HFModel:
    """The model that --model or the checkpoint's args.json names."""
    if args.model is None:
        raise UserError("--model is needed: name a Hugging Face folder or hub id")
    return read_model(
        args.model,
        use_hf=getattr(args, "use_hf", False),
        trust_remote_code=args.trust_remote_code,
    )


def read_training_arguments(
    cls: type[Any], argv: list[str], prog: str
) -> tuple[Any, dict[str, str], HFModel]:
    """Parse, resolve and complete `argv`; returns the arguments, their sources and the model."""
    given = parse_flags(cls, argv, prog)
    layers = inherited(given.get("load"), given.get("load_args", True))
    args, sources = resolve(cls, given, layers)
    model = read_named_model(args)
    args.model = str(model.folder)
    _choose_dtype(args, sources, model)
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
        if not platform.has_cuda():
            args.torch_dtype, sources["torch_dtype"] = "float32", "no GPU"
        elif args.torch_dtype is None:
            args.torch_dtype, sources["torch_dtype"] = model.dtype, "config.json"
    for flag, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        if getattr(args, flag) is None:
            setattr(args, flag, args.torch_dtype == dtype)
