"""Adapters attached to a live model: made, filled alike in every layout, and stored alone."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from swiftmeg import distributed
from swiftmeg.args.adapter_config import fits
from swiftmeg.args.tuner import LoraArguments
from swiftmeg.errors import UserError
from swiftmeg.export.shards import global_name
from swiftmeg.tuners.embedding import EmbeddingAdapter
from swiftmeg.tuners.experts import (
    ColumnExpertAdapter,
    ExpertAdapter,
    RouterAdapter,
    RowExpertAdapter,
    share_random_state,
)
from swiftmeg.tuners.factors import Factor
from swiftmeg.tuners.freezing import everywhere, let_gradients_pass
from swiftmeg.tuners.layers import (
    Adapter,
    ColumnAdapter,
    RowAdapter,
    WholeAdapter,
)
from swiftmeg.tuners.targets import choose_targets, parameters_to_save


@dataclass(frozen=True)
class Attached:
    """An adapter and the name of its module in the whole model."""

    name: str
    adapter: Adapter


def _refuse_biased_experts(models: list[Any]) -> None:
    """UserError, on every rank, if something of experts with biases is trained.

    Only GPT-OSS has them. Its files hold a layer's experts transposed in one tensor, for which
    there is no form of adapters yet.
    """
    found = any(
        parameter.requires_grad
        for chunk in unwrap_model(models)
        for module in chunk.modules()
        if (isinstance(module, ExpertAdapter) and module.base_layer.use_bias)
        or (getattr(module, "num_gemms", 0) and module.use_bias)
        for parameter in module.parameters()
    )
    (nowhere,) = everywhere([not found])
    if not nowhere:
        raise UserError(
            "--train_type lora cannot train the experts of this model, which have biases: pass "
            "--target_modules linear_qkv linear_proj (and the router if wanted), and neither "
            "--lora_bias all nor --modules_to_save for them"
        )


def _refuse_experts_lengths(models: list[Any]) -> None:
    """UserError, on every rank, for DoRA beside a layer of the MLPs of a model with experts.

    transformers holds experts, and PEFT all layers of their names, as parameters: no DoRA there.
    """
    found = any(
        chunk.config.num_moe_experts is not None and ".mlp." in each.name
        for chunk in unwrap_model(models)
        for each in attached([chunk])
    )
    (nowhere,) = everywhere([not found])
    if not nowhere:
        raise UserError(
            "--use_dora true reaches no MLP or router of a model with experts, where PEFT has no "
            "DoRA: pass --target_modules with the layers of the attention, such as linear_qkv "
            "linear_proj"
        )


def _say_no_biases(models: list[Any]) -> None:
    """Say so where --lora_bias all finds nothing to train; collective."""
    names = (name for chunk in models for name, _ in chunk.named_parameters())
    (nowhere,) = everywhere([not any(name.endswith(".bias") for name in names)])
    if nowhere and distributed.on_rank_zero():
        print("--lora_bias all: the model has no biases, so none is trained", flush=True)


def attached(models: list[Any]) -> Iterator[Attached]:
    """Every adapter on this rank, in the order of the layers."""
    for chunk in unwrap_model(models):
        for name, module in chunk.named_modules():
            if isinstance(module, Adapter):
                yield Attached(global_name(chunk, name), module)


def attach(models: list[Any], args: LoraArguments, seed: int) -> list[Any]:
    """Put adapters beside the targets and freeze everything else; returns `models`. Collective.

    `models` are bare chunks of this rank, with their weights. A factor's values come from `seed`
    and its module's name alone, so they are the same in every layout.
    """
    saved = parameters_to_save(models, args)
    for chunk, targets in zip(models, choose_targets(models, args), strict=True):
        gated = chunk.config.gated_linear_unit
        chunk.requires_grad_(False)
        if targets:
            inject_adapter_in_model(_peft_config(args, chunk, targets), chunk)
        elif args.lora_bias == "all":
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(name.endswith(".bias"))
        for name, module in chunk.named_modules():
            if isinstance(module, Adapter):
                module.gated = gated and name.endswith("linear_fc1")
            elif isinstance(module, TopKRouter):
                module.frozen_expert_bias = True  # a buffer of the model, which stays as it is
    if args.lora_bias == "all":
        _say_no_biases(models)
    for parameter in saved:
        parameter.requires_grad_(True)
    _refuse_biased_experts(models)
    if args.use_dora:
        _refuse_experts_lengths(models)
    for each in attached(models):
        initialise(each, seed, args.init_lora_weights == "gaussian")
    share_random_state([each.adapter for each in attached(models)], seed)
    (nothing,) = everywhere([not any(p.requires_grad for m in models for p in m.parameters())])
    if nothing:
        raise UserError("--target_modules and --modules_to_save are empty: name what to train")
    let_gradients_pass(models)
    for chunk in models:
        _store_trained_alone(chunk)
    return models


def _peft_config(args: LoraArguments, chunk: Any, targets: list[str]) -> LoraConfig:
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        rank_pattern=_chosen(args.rank_pattern, chunk, targets),
        alpha_pattern=_chosen(args.alpha_pattern, chunk, targets),
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        target_modules=targets,
    )
    config._register_custom_module({torch.nn.Module: adapter_beside})
    return config


def _chosen(pattern: dict[str, Any], chunk: Any, targets: list[str]) -> dict[str, Any]:
    """What a pattern says of this chunk's modules, by their names here."""
    chosen = {}
    for target in targets:
        values = (value for key, value in pattern.items() if fits(key, global_name(chunk, target)))
        if (value := next(values, None)) is not None:
            chosen[re.escape(target)] = value
    return chosen


def adapter_beside(target: Any, adapter_name: str, config: LoraConfig, **options: Any) -> Adapter:
    """The adapter that fits a layer: how its live weight is cut decides, not its class."""
    grouped = hasattr(target, "num_gemms")
    weight = target.weight0 if grouped else target.weight
    row = getattr(weight, "tensor_model_parallel", False) and weight.partition_dim == 1
    kind: type[Adapter] = WholeAdapter
    if grouped:
        kind = RowExpertAdapter if row else ColumnExpertAdapter
    elif isinstance(target, TopKRouter):
        kind = RouterAdapter
    elif isinstance(target, VocabParallelEmbedding):
        kind = EmbeddingAdapter
    elif getattr(weight, "tensor_model_parallel", False):
        kind = RowAdapter if row else ColumnAdapter
    return kind(target, adapter_name, config, options["r"], options["lora_alpha"])


@torch.no_grad()
def initialise(each: Attached, seed: int, gaussian: bool = False) -> None:
    """Fill the factors as PEFT does: A uniform within 1 / sqrt(inputs) or normal, and B zero.

    For an embedding, whose A is a table, it is A that is zero and B that is normal. Values are
    drawn for the whole factor, then cut. DoRA's lengths begin as those of the weight.
    """
    table = isinstance(each.adapter, EmbeddingAdapter)
    factor = each.adapter.B if table else each.adapter.A
    if factor.weight.is_meta:
        return  # a dry run, whose weights have shapes only
    for number, shard in numbered(factor, each.adapter):
        whole = list(shard.shape)
        if factor.axis is not None:
            whole[factor.axis - factor.weight.dim()] *= each.adapter.group.size()
        digest = hashlib.sha256(f"{seed} {each.name} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        values = torch.empty(whole)
        if table:
            values.normal_(generator=generator)
        elif gaussian:
            values.normal_(std=1 / whole[-2], generator=generator)
        else:
            bound = 1 / math.sqrt(whole[-1])
            values.uniform_(-bound, bound, generator=generator)
        shard.copy_(cut(values, factor, each.adapter))
    if each.adapter.magnitude is not None:
        each.adapter.magnitude.weight.copy_(each.adapter.norms())


def numbered(factor: Factor, adapter: Adapter) -> Iterator[tuple[int | None, Tensor]]:
    """A factor's matrices: one, or one for each expert here with its number in the model."""
    if factor.weight.dim() == 2:
        yield None, factor.weight
        return
    for local, matrix in enumerate(factor.weight):
        yield adapter.first_expert + local, matrix


def cut(values: Tensor, factor: Factor, adapter: Adapter) -> Tensor:
    """This rank's part of a whole matrix, for a factor whose cut axis is that of plain chunks."""
    if factor.axis is None:
        return values
    axis = factor.axis - factor.weight.dim()
    return values.chunk(adapter.group.size(), dim=axis)[adapter.group.rank()]


def _store_trained_alone(chunk: Any) -> None:
    """Let checkpoints hold what is trained, and miss nothing else when they are read."""
    complete = chunk.sharded_state_dict

    def trained() -> list[str]:
        return [name for name, parameter in chunk.named_parameters() if parameter.requires_grad]

    def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
        entries = complete(*args, **kwargs)
        return {name: entries[name.replace(".base_layer.", ".")] for name in trained()}

    def forgive(module: torch.nn.Module, keys: Any) -> None:
        names = set(trained())
        keys.missing_keys[:] = [name for name in keys.missing_keys if name in names]

    sharded_state_dict.complete = complete  # type: ignore[attr-defined]
    chunk.sharded_state_dict = sharded_state_dict
    chunk.register_load_state_dict_post_hook(forgive)


def store_everything(chunk: Any) -> None:
    """Let checkpoints of a chunk whose adapters are merged hold the whole model again."""
    chunk.sharded_state_dict = chunk.sharded_state_dict.complete
