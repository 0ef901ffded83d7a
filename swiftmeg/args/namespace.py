"""From resolved arguments to Megatron's own namespace."""

import argparse
import dataclasses
import difflib
import os
import sys
from typing import Any, NoReturn

from megatron.training import arguments as megatron_arguments

from swiftmeg import platform
from swiftmeg.args.megatron import MegatronFlags
from swiftmeg.errors import UserError
from swiftmeg.models.arguments import MODEL_SWITCHES


def megatron_flags(args: Any) -> dict[str, Any]:
    """The fields of `args` that are declared as Megatron's, by name."""
    names = {
        field.name
        for base in type(args).__mro__
        if MegatronFlags in base.__bases__
        for field in dataclasses.fields(base)
    }
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def model_flags(megatron_args: dict[str, Any]) -> dict[str, Any]:
    """Megatron flags of a model from its family's arguments."""
    flags = {k: v for k, v in megatron_args.items() if k not in (*MODEL_SWITCHES, "vocab_size")}
    flags["rotary_base"] = int(flags["rotary_base"])
    for name, value in flags.items():
        if name.endswith("_freq") and isinstance(value, list | tuple):
            flags[name] = f"[{','.join(map(str, value))}]"  # a pattern is one word, not several
    return flags | {
        "group_query_attention": not flags.get("multi_latent_attention"),
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "swiglu": not flags.get("quick_geglu"),
        "disable_bias_linear": True,
    }


def _to_argv(parser: argparse.ArgumentParser, flags: dict[str, Any], where: str) -> list[str]:
    argv: list[str] = []
    known = {word.replace("_", "-"): word for word in parser._option_string_actions}
    for name, value in flags.items():
        if value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        if flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f": did you mean {near[0][2:].replace('-', '_')}?" if near else ""
            raise UserError(f"{where}: Megatron has no argument {name}{hint}")
        argv.append(known[flag])
        if isinstance(value, list | tuple):
            argv.extend(str(item) for item in value)
        elif value is not True:
            argv.append(str(value))
    return argv


def megatron_namespace(
    flags: dict[str, Any],
    extra: dict[str, Any],
    attributes: dict[str, Any],
) -> argparse.Namespace:
    """Parse and validate Megatron's arguments and make them its global ones.

    `flags` are Megatron arguments by name, `extra` the user's extra_megatron_kwargs, which win;
    `attributes` are set on the namespace as they are. Raises UserError for names that Megatron does
    not know and for values that it refuses.
    """
    from megatron.training.global_vars import set_global_variables

    def write_command_line(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Called by parse_args with the complete parser, just before it reads sys.argv."""

        def refuse(message: str) -> NoReturn:
            raise UserError(f"Megatron refuses these arguments: {message}")

        parser.error = refuse  # type: ignore[method-assign]
        own = _to_argv(parser, {k: v for k, v in flags.items() if k not in extra}, "swiftmeg")
        sys.argv = ["megatron", *own, *_to_argv(parser, extra, "--extra_megatron_kwargs")]
        return parser

    command = sys.argv
    try:
        args = megatron_arguments.parse_args(extra_args_provider=write_command_line)
    finally:
        sys.argv = command
    for name, value in attributes.items():
        setattr(args, name, value)
    try:
        megatron_arguments.validate_args(args)
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron refuses these arguments: {error}") from None
    set_global_variables(args, build_tokenizer=False)
    return args


def layout_attributes(
    megatron_args: dict[str, Any],
    padded_vocab: int,
    backend: str,
    *,
    accumulate: bool = False,
    in_blocks: bool = False,
) -> dict[str, Any]:
    """Attributes of the namespace that the model builder reads.

    `accumulate`: products add weight gradients to Megatron's buffers. `in_blocks`: the loss is
    computed without whole logits.
    """
    return {
        "vocab_size": megatron_args["vocab_size"],
        "family_arguments": list(megatron_args),
        "padded_vocab_size": padded_vocab,
        "layer_backend": backend,
        "accumulate_inside_products": accumulate,
        "logits_in_blocks": in_blocks,
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "distributed_backend": platform.backend(),
        **MODEL_SWITCHES,
        **{name: value for name, value in megatron_args.items() if name in MODEL_SWITCHES},
    }
