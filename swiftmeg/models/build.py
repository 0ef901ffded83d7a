"""From Megatron's arguments to the model that its loop builds."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models import GPTModelConfig

from swiftmeg import upstream
from swiftmeg.errors import UserError
from swiftmeg.models import head
from swiftmeg.models.arguments import LayerSwitches
from swiftmeg.models.kernels.weight_gradient import add_product
from swiftmeg.models.layers import block_spec, prediction_spec
from swiftmeg.models.layout import Dims
from swiftmeg.models.mtp import attach_prediction_losses, read_before_norm
from swiftmeg.models.rope import (
    LatentRotaryEmbedding,
    ScaledRotaryEmbedding,
    TypedRotaryEmbedding,
    rope_types,
    rotate_pack,
)

ModelHook = Callable[[list[GPTModel]], list[GPTModel]]

VOCABULARY_MULTIPLE = 128

_EXTRA_STATE = re.compile(r"_extra_state\d*$")
"""TransformerEngine's grouped linear layers number theirs."""


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding in memory: the next multiple of 128 that TP divides.

    It is the same for every power-of-two TP up to 128, so that checkpoints rarely change shape
    between layouts.
    """
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor_parallel_size)
    return math.ceil(vocab_size / multiple) * multiple


def dims_of(args: Any) -> Dims:
    """The sizes that weight layouts need, from Megatron's namespace."""
    return Dims(
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        vocab_size=args.vocab_size,
        padded_vocab_size=args.padded_vocab_size,
        linear_num_key_heads=args.linear_num_key_heads,
        linear_num_value_heads=args.linear_num_value_heads,
        linear_key_head_dim=args.linear_key_head_dim,
    )


def model_config(
    args: Any,
    hf_config: Any,
    pre_wrap_hooks: list[ModelHook] | None = None,
    post_wrap_hooks: list[ModelHook] | None = None,
) -> GPTModelConfig:
    """Describe the GPT model that `args` (Megatron's namespace) and a transformers config define.

    `pre_wrap_hooks` receive the bare model chunks of this rank, positions and vocabulary ready,
    before they are moved, cast or wrapped.
    """

    def spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
        switches = LayerSwitches.of(args)
        return block_spec(config.transformer, args.layer_backend, vp_stage, switches)

    def predictions(vp_stage: int | None = None) -> Any:
        switches = LayerSwitches.of(args)
        return prediction_spec(config.transformer, args.layer_backend, vp_stage, switches)

    def finish(models: list[GPTModel]) -> list[GPTModel]:
        for model in models:
            _use_hf_rope(model, hf_config)
            if args.num_experts is not None:
                _keep_marks_whole(model)
            head.prepare(
                model,
                args.vocab_size,
                in_blocks=args.logits_in_blocks,
                accumulates=args.accumulate_inside_products,
            )
            if model.mtp_process and LayerSwitches.of(args).predictions_before_norm:
                read_before_norm(model)
            if not args.fp8:
                _leave_out_extra_state(model)
            if args.accumulate_inside_products:
                _accumulate_inside_products(model)
        return models

    try:
        config = gpt_config_from_args(args)
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron refuses these arguments: {error}") from None
    if config.transformer.multi_latent_attention:
        # The kind that takes a factor on cosine and sine, which is 1 unless the scaling is yarn.
        config.transformer.rope_type = "yarn"
    config.transformer_layer_spec = spec
    config.prediction_spec = predictions
    upstream.attach_prediction_losses(attach_prediction_losses)
    upstream.rotate_packs(rotate_pack)
    upstream.accumulate_by(add_product)
    config.pre_wrap_hooks = [finish, *(pre_wrap_hooks or [])]
    config.post_wrap_hooks = list(post_wrap_hooks or [])
    return config


def _accumulate_inside_products(model: GPTModel) -> None:
    """Let TransformerEngine's layers and the experts add weight gradients to Megatron's buffer.

    Megatron has one switch for these and for its own layers, which need apex's kernel for it.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _use_hf_rope(model: GPTModel, hf_config: Any) -> None:
    config, cp_group = model.config, model.pg_collection.cp
    if config.multi_latent_attention:
        rope = LatentRotaryEmbedding(hf_config, config.qk_pos_emb_head_dim, cp_group)
        for layer in _attention_layers(model):
            layer.self_attention.rotary_pos_emb = rope
        return
    dim = int(config.kv_channels * model.rotary_percent)
    ropes = {
        kind: ScaledRotaryEmbedding(hf_config, dim, cp_group, config.rotary_interleaved, kind)
        for kind in rope_types(hf_config)
    }
    typed = TypedRotaryEmbedding(ropes) if None not in ropes else None  # type: ignore[arg-type]
    model.rotary_pos_emb = typed or ropes[None]
    for layer in _attention_layers(model):
        kind = None if typed is None else hf_config.layer_types[layer.layer_number - 1]
        # Megatron's name for the factor on cosine and sine, whatever the scaling.
        layer.self_attention._yarn_concentration_factor = ropes[kind].attention_scaling
        if typed is not None:
            typed.choose(layer.self_attention, str(kind))


def _attention_layers(model: GPTModel) -> Iterator[Any]:
    """Every layer of this chunk, those that predict further tokens included."""
    yield from model.decoder.layers
    if model.mtp_process:
        yield from (layer.mtp_model_layer for layer in model.mtp.layers)


def _keep_marks_whole(model: GPTModel) -> None:
    """Hand experts their tokens' marks as they came.

    Under sequence parallelism Megatron would cut them, on the first pipeline stage only and before
    prediction modules shift them; layers of experts do it themselves.
    """
    preprocess = model._preprocess

    def keep(*args: Any, padding_mask: Any = None, **kwargs: Any) -> Any:
        outputs = preprocess(*args, **kwargs)
        return (*outputs[:5], padding_mask, *outputs[6:])

    model._preprocess = keep


def _leave_out_extra_state(model: GPTModel) -> None:
    """Keep TransformerEngine's `_extra_state` (FP8 scales, else empty) out of checkpoints.

    Without it both layer backends read and write the same entries.
    """
    complete = model.sharded_state_dict

    def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
        entries = complete(*args, **kwargs)
        return {k: v for k, v in entries.items() if not _EXTRA_STATE.search(k)}

    def forgive(module: torch.nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [k for k in keys.missing_keys if not _EXTRA_STATE.search(k)]

    model.sharded_state_dict = sharded_state_dict
    model.register_load_state_dict_post_hook(forgive)
