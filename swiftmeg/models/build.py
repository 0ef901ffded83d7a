"""From Megatron's arguments to the model that its loop builds."""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models import GPTModelConfig

from swiftmeg.models.layers import block_spec
from swiftmeg.models.layout import Dims
from swiftmeg.models.rope import ScaledRotaryEmbedding

ModelHook = Callable[[list[GPTModel]], list[GPTModel]]

VOCABULARY_MULTIPLE = 128


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
        return block_spec(
            config.transformer,
            args.layer_backend,
            vp_stage,
            attention_output_bias=args.attention_output_bias,
            mlp_bias=args.mlp_bias,
        )

    def finish(models: list[GPTModel]) -> list[GPTModel]:
        for model in models:
            _use_hf_rope(model, hf_config)
            _forbid_padded_vocabulary(model, args.vocab_size)
            if not args.fp8:
                _leave_out_extra_state(model)
        return models

    config = gpt_config_from_args(args)
    config.transformer_layer_spec = spec
    config.pre_wrap_hooks = [finish, *(pre_wrap_hooks or [])]
    config.post_wrap_hooks = list(post_wrap_hooks or [])
    return config


def _use_hf_rope(model: GPTModel, hf_config: Any) -> None:
    rope = ScaledRotaryEmbedding(hf_config, model.config.kv_channels, model.pg_collection.cp)
    model.rotary_pos_emb = rope
    for layer in model.decoder.layers:
        # Megatron's name for the factor on cosine and sine, whatever the scaling.
        layer.self_attention._yarn_concentration_factor = rope.attention_scaling


def _forbid_padded_vocabulary(model: GPTModel, vocab_size: int) -> None:
    """Take the rows that pad the vocabulary out of the softmax, forward and backward."""
    if not model.post_process or model.vocab_size == vocab_size:
        return
    rows = model.vocab_size // mpu.get_tensor_model_parallel_world_size()
    first = max(vocab_size - rows * mpu.get_tensor_model_parallel_rank(), 0)
    if first >= rows:
        return

    def mask(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        logits, bias = output
        logits[..., first:] = torch.finfo(logits.dtype).min
        return logits, bias

    model.output_layer.register_forward_hook(mask)


def _leave_out_extra_state(model: GPTModel) -> None:
    """Keep TransformerEngine's `_extra_state` (FP8 scales, else empty) out of checkpoints.

    Without it both layer backends read and write the same entries.
    """
    complete = model.sharded_state_dict

    def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
        entries = complete(*args, **kwargs)
        return {k: v for k, v in entries.items() if not k.endswith("_extra_state")}

    def forgive(module: torch.nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [k for k in keys.missing_keys if not k.endswith("_extra_state")]

    model.sharded_state_dict = sharded_state_dict
    model.register_load_state_dict_post_hook(forgive)
