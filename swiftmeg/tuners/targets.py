"""Which modules get an adapter, and which are trained whole."""

import re
from collections.abc import Iterator
from typing import Any

import torch

from swiftmeg.args.adapter_config import fits
from swiftmeg.args.tuner import LoraArguments
from swiftmeg.errors import UserError
from swiftmeg.export.shards import global_name, spellings
from swiftmeg.tuners.freezing import everywhere

EMBEDDING = "embedding.word_embeddings"
HEAD = "output_layer"
ALL = {
    "all-linear": re.compile(r"decoder\.layers\.\d+\..*\b(linear_\w+|in_proj|out_proj)"),
    "all-embedding": re.compile(re.escape(EMBEDDING)),
    "all-router": re.compile(r"decoder\.layers\.\d+\.mlp\.router"),
}
"""Words for groups of modules, and the names that each stands for."""


def candidates(chunk: Any) -> Iterator[tuple[str, str]]:
    """Every module that can have an adapter: its name in the whole model, and its name here."""
    groups = [*ALL.values(), re.compile(HEAD)]
    for name, _ in chunk.named_modules():
        in_model = global_name(chunk, name)
        if any(pattern.fullmatch(in_model) for pattern in groups):
            yield in_model, name


def choose_targets(models: list[Any], args: LoraArguments) -> list[list[str]]:
    """For each chunk the names, here, of the modules that get an adapter. Collective.

    UserError for a word or expression that fits no module, or only modules without weights of
    their own.
    """
    flag, words = "target_modules", args.target_modules
    if args.target_regex is not None:
        flag, words = "target_regex", [args.target_regex]
    chosen: list[list[str]] = []
    unused = set(words)
    for chunk in models:
        chosen.append([])
        for in_model, here in candidates(chunk):
            fitting = {word for word in words if _fits(word, in_model, flag == "target_regex")}
            unused -= fitting
            if fitting and not any(_names(in_model, kept) for kept in args.modules_to_save):
                if in_model in (EMBEDDING, HEAD) and chunk.share_embeddings_and_output_weights:
                    raise UserError(_tied(flag, in_model))
                chosen[-1].append(here)
    _refuse_unused(flag, words, unused)
    for flag in ("rank_pattern", "alpha_pattern"):
        _refuse_idle(flag, list(getattr(args, flag)), models, chosen)
    return chosen


def _refuse_idle(flag: str, keys: list[str], models: list[Any], chosen: list[list[str]]) -> None:
    """UserError for a key of a pattern that fits no module with an adapter; collective."""
    names = [
        global_name(chunk, here)
        for chunk, targets in zip(models, chosen, strict=True)
        for here in targets
    ]
    idle = [not any(fits(key, name) for name in names) for key in keys]
    for key, nowhere in zip(keys, everywhere(idle), strict=True):
        if nowhere:
            raise UserError(
                f"--{flag} {key} fits no module with an adapter: its keys are expressions for the "
                "ends of Megatron's names, such as linear_proj or layers.0.mlp.linear_fc2"
            )


def parameters_to_save(models: list[Any], args: LoraArguments) -> list[torch.nn.Parameter]:
    """The parameters, here, of the modules that are trained whole. Collective.

    UserError for a word that fits no module.
    """
    words = [EMBEDDING if word == "all-embedding" else word for word in args.modules_to_save]
    unused = set(words)
    chosen = []
    for chunk in models:
        tied = chunk.share_embeddings_and_output_weights
        for name, parameter in chunk.named_parameters():
            in_model = global_name(chunk, name)
            if tied and in_model == f"{HEAD}.weight":
                in_model = f"{EMBEDDING}.weight"  # the last stage's copy of it
            modules = [each.rpartition(".")[0] for each in spellings(in_model)]
            fitting = {word for word in words if any(_names(each, word) for each in modules)}
            unused -= fitting
            if fitting:
                chosen.append(parameter)
    _refuse_unused("modules_to_save", words, unused)
    return chosen


def _fits(word: str, name: str, is_regex: bool) -> bool:
    if is_regex:
        return re.fullmatch(word, name) is not None
    return ALL[word].fullmatch(name) is not None if word in ALL else _names(name, word)


def _names(name: str, word: str) -> bool:
    """Whether `word` is the end of a module's name, from a dot on."""
    return name == word or name.endswith(f".{word}")


def _refuse_unused(flag: str, words: list[str], unused: set[str]) -> None:
    for word, absent in zip(words, everywhere([word in unused for word in words]), strict=True):
        if absent:
            raise UserError(
                f"--{flag} {word} fits no module of the model: use Megatron's names, such as "
                "linear_qkv, linear_proj, linear_fc1, linear_fc2, word_embeddings or output_layer"
                + ("" if flag == "modules_to_save" else f", or {', '.join(ALL)}")
            )


def _tied(flag: str, name: str) -> str:
    return (
        f"--{flag}: the model's embedding is its head too, so an adapter of {name} alone could "
        "never be merged: leave it out, or train it whole by --modules_to_save word_embeddings"
    )
