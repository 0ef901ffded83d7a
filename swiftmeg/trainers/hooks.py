"""What happens to a bare model before Megatron's loop wraps it: weights come, some are frozen."""

from collections.abc import Callable
from functools import partial
from typing import Any

from swiftmeg import upstream
from swiftmeg.args.adapter_config import RESIDUAL_STARTS
from swiftmeg.export.hf_reader import load_hf
from swiftmeg.export.model import load_weights
from swiftmeg.models.build import dims_of
from swiftmeg.trainers.method import Run
from swiftmeg.trainers.routers import settle_routers
from swiftmeg.tuners.adapters import attach
from swiftmeg.tuners.freezing import freeze
from swiftmeg.tuners.hf_form import fill_adapters
from swiftmeg.tuners.residual import ResidualWeights


def model_hooks(run: Run, megatron: Any) -> list[Callable[[list[Any]], list[Any]]]:
    """The hooks of a run, in order.

    Megatron itself loads the checkpoint that the run continues, when the model is wrapped. What
    adapters are trained beside is loaded here: it is no part of that checkpoint.
    """
    args, model = run.args, run.model
    hooks: list[Callable[[list[Any]], list[Any]]] = []

    def from_hf(models: list[Any]) -> list[Any]:
        load_hf(models, model.folder, model.family, model.config, dims_of(megatron))
        return models

    def from_residual(models: list[Any]) -> list[Any]:
        weights = ResidualWeights(model, models, args.init_lora_weights)
        load_hf(models, model.folder, model.family, model.config, dims_of(megatron), weights)
        return models

    residual = args.is_lora and args.init_lora_weights in RESIDUAL_STARTS
    if args.load is None:
        hooks += [] if residual else [from_hf]
    elif args.is_lora:
        hooks.append(partial(load_weights, folder=args.load))
    if args.is_lora or args.freezes:
        upstream.store_layers_by_number()
    hooks += tuner_hooks(args)
    if residual:  # the adapters say of which weights
        hooks.append(from_residual)
    if args.is_lora and (adapters := run.adapters) is not None:

        def from_peft(models: list[Any]) -> list[Any]:
            dims = dims_of(megatron)
            fill_adapters(models, adapters, model.family, model.config, dims)
            return models

        hooks.append(from_peft)
    if megatron.num_experts is not None:
        hooks.append(partial(settle_routers, args=args, sources=run.sources))
    return hooks


def tuner_hooks(args: Any) -> list[Callable[[list[Any]], list[Any]]]:
    """The hooks that decide which parameters there are and which of them are trained."""
    if args.is_lora:
        return [partial(attach, args=args, seed=args.seed)]
    return [partial(freeze, args=args)] if args.freezes else []
