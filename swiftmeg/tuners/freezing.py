"""Parameters that stay as they are, while others are trained.

A frozen parameter takes no gradient, no master copy and no optimizer state: Megatron makes those
for parameters that require a gradient when it wraps the model, which is after this hook has run.
"""

import re
from typing import Any

import torch
from torch.nn import Parameter

from swiftmeg.args.tuner import FreezingArguments
from swiftmeg.errors import UserError
from swiftmeg.export.shards import LiveWeight, live_weights, spellings
from swiftmeg.models.family import EMBEDDING, OUTPUT


def freeze(models: list[Any], args: FreezingArguments) -> list[Any]:
    """Freeze what the flags name, then let train what they except; returns `models`. Collective.

    UserError for a pattern that names no parameter of the model, and if nothing is left to train.
    """
    weights = [each for each in live_weights(models) if isinstance(each.tensor, Parameter)]
    tied = any(chunk.share_embeddings_and_output_weights for chunk in models)
    names = [_names(weight, tied) for weight in weights]
    for index in _first_share(weights, args.freeze_parameters_ratio):
        weights[index].tensor.requires_grad_(False)
    unknown = []
    for flag, patterns, is_regex, trained in (
        ("freeze_parameters", args.freeze_parameters, False, False),
        ("freeze_parameters_regex", [args.freeze_parameters_regex], True, False),
        ("trainable_parameters", args.trainable_parameters, False, True),
        ("trainable_parameters_regex", [args.trainable_parameters_regex], True, True),
    ):
        for pattern in filter(None, patterns):
            found = [i for i, each in enumerate(names) if _matches(pattern, each, is_regex)]
            for index in found:
                weights[index].tensor.requires_grad_(trained)
            unknown.append((f"--{flag} {pattern}", not found))
    trained_here = any(weight.tensor.requires_grad for weight in weights)
    *missing, nothing = everywhere([here for _, here in unknown] + [not trained_here])
    for (flag, _), absent in zip(unknown, missing, strict=True):
        if absent:
            raise UserError(
                f"{flag} fits no parameter of the model: names start with "
                "embedding.word_embeddings, decoder.layers.0, decoder.final_layernorm or "
                "output_layer"
            )
    if nothing:
        raise UserError("the flags freeze every parameter of the model: leave some to train")
    let_gradients_pass(models)
    return models


def let_gradients_pass(models: list[Any]) -> None:
    """Let gradients reach trained layers above a frozen embedding when layers are recomputed.

    A recomputed layer is one autograd function of its input; where that needs no gradient, nor
    does the output, and the layer's own weights would silently get none.
    """

    def require(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            return output.requires_grad_()
        return output

    for chunk in models:
        if chunk.pre_process and chunk.config.recompute_granularity == "full":
            chunk.embedding.register_forward_hook(require)


def _names(weight: LiveWeight, tied: bool) -> tuple[str, ...]:
    """Every name that a parameter goes by; a last stage's copy of a tied embedding is that."""
    return spellings(EMBEDDING if tied and weight.name == OUTPUT else weight.name)


def _matches(pattern: str, names: tuple[str, ...], is_regex: bool) -> bool:
    if is_regex:
        return any(re.search(pattern, name) for name in names)
    return any(name.startswith(pattern) for name in names)


def _first_share(weights: list[LiveWeight], ratio: float) -> range:
    """Indices of the parameters that lie whole within the first `ratio` of all weights."""
    if not ratio:
        return range(0)
    sizes = torch.tensor([each.tensor.numel() * each.pieces for each in weights])
    return range(int((sizes.cumsum(0) <= sizes.sum() * ratio).sum()))


def everywhere(flags: list[bool]) -> list[bool]:
    """Which of `flags` hold on all ranks."""
    held = torch.tensor(flags, dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MIN)
    return held.bool().tolist()
