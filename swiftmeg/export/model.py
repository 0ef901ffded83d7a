"""A Megatron model without an optimizer, for conversion."""

import argparse
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing
from megatron.training.initialize import initialize_megatron

from swiftmeg import platform, upstream
from swiftmeg.args.namespace import layout_attributes, megatron_namespace, model_flags
from swiftmeg.checkpoint import folder_name, read_common_state, read_iteration
from swiftmeg.errors import UserError
from swiftmeg.export.lazy_weights import Weights, Whole
from swiftmeg.export.mcore_writer import SharedOut, StreamingSave
from swiftmeg.models.arguments import MODEL_SWITCHES
from swiftmeg.models.build import model_config, padded_vocab_size
from swiftmeg.models.hf import HFModel

_SHAPES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "untie_embeddings_and_output_weights",
    "add_qkv_bias",
    "qk_layernorm",
)
"""Arguments that decide which parameters a model has, and their shapes; compared in checkpoints of
other programs, which may say the same model in other words."""

OVERRIDABLE = (
    "max_position_embeddings",
    "norm_epsilon",
    "rotary_base",
    "rope_type",
    "rotary_scaling_factor",
    "mscale_all_dim",
    "attention_dropout",
    "moe_router_load_balancing_type",
    "router_fp32",
)
"""Arguments of a model that a run may change: all others are compared in swiftmeg's checkpoints."""

_ATTRIBUTES = {"apply_layernorm_1p": "layernorm_zero_centered_gamma"}
"""Names in Megatron's namespace of arguments that have another one there."""


def build_model(args: Any, model: HFModel) -> tuple[argparse.Namespace, list[Any]]:
    """Build this rank's chunks of `model` with native layers; sets Megatron's globals.

    `args` needs torch_dtype, the tensor- and pipeline-parallel sizes and extra_megatron_kwargs.
    The weights have no values yet.
    """
    namespace = conversion_namespace(args, model)
    if not mpu.model_parallel_is_initialized():
        initialize_megatron(allow_no_cuda=True)
    config = model_config(namespace, model.hf_config)
    config.finalize()
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models = builder.build_distributed_models(groups, wrap_with_ddp=False)
    return namespace, models


def conversion_namespace(args: Any, model: HFModel) -> argparse.Namespace:
    """Megatron's namespace for converting `model` in the layout that `args` says."""
    upstream.apply()
    return megatron_namespace(
        _flags(args, model), args.extra_megatron_kwargs, _attributes(args, model)
    )


def _flags(args: Any, model: HFModel) -> dict[str, Any]:
    flags = model_flags(model.megatron_args)
    return flags | {
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "decoder_first_pipeline_num_layers": args.decoder_first_pipeline_num_layers,
        "decoder_last_pipeline_num_layers": args.decoder_last_pipeline_num_layers,
        "expert_model_parallel_size": getattr(args, "expert_model_parallel_size", 1),
        "expert_tensor_parallel_size": getattr(args, "expert_tensor_parallel_size", None),
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "seq_length": min(512, flags["max_position_embeddings"]),
        "micro_batch_size": 1,
        "bf16": args.torch_dtype == "bfloat16",
        "fp16": args.torch_dtype == "float16",
        "transformer_impl": "local",
        "distributed_backend": platform.backend(),
        "no_rope_fusion": True,
        "no_gradient_accumulation_fusion": True,
        "no_persist_layer_norm": True,
        "no_masked_softmax_fusion": True,
        "no_save_optim": True,
        "no_save_rng": True,
        "no_load_optim": True,
        "no_load_rng": True,
        "no_initialization": True,
        "finetune": True,
        "exit_on_missing_checkpoint": True,
    }


def _attributes(args: Any, model: HFModel) -> dict[str, Any]:
    built = model.megatron_args
    vocabulary = padded_vocab_size(built["vocab_size"], args.tensor_model_parallel_size)
    return layout_attributes(built, vocabulary, "native")


def saved_arguments(folder: Path, step: int | None = None) -> Any:
    """Megatron's namespace of the run that wrote iteration `step`, or the latest, of `folder`."""
    name = read_iteration(folder) if step is None else folder_name(step)
    return read_common_state(folder / name).get("args")


def check_same_model(
    namespace: argparse.Namespace, saved: Any, model: HFModel, flag: str, folder: Path
) -> None:
    """UserError unless `saved`, from the checkpoint that `flag` names, is of a model like this."""
    was, now = [], []

    def compare(name: str, value: Any) -> None:
        wanted = getattr(namespace, name)
        if value != wanted:
            was.append(f"{name}={value}")
            now.append(f"{name}={wanted}")

    if hasattr(saved, "layer_backend"):
        for name in _defining(namespace, saved):
            if hasattr(saved, name):
                compare(name, getattr(saved, name))
    else:
        for name in _SHAPES:
            value = getattr(saved, name, None)
            if name == "num_query_groups" and not getattr(saved, "group_query_attention", False):
                value = None  # Megatron's own default, without a meaning
            if value is not None:
                compare(name, value)
    if was:
        raise UserError(
            f"{flag} {folder} holds a model with {', '.join(was)}, but --model {model.folder} says "
            f"{', '.join(now)}: name the model that the checkpoint comes from"
        )


def _defining(namespace: argparse.Namespace, saved: Any) -> list[str]:
    """What says which model it is: the arguments of both families but OVERRIDABLE."""
    names = [*namespace.family_arguments, *getattr(saved, "family_arguments", ()), *MODEL_SWITCHES]
    kept = [name for name in dict.fromkeys(names) if name not in OVERRIDABLE]
    return [_ATTRIBUTES.get(name, name) for name in kept]


def load_weights(models: list[Any], folder: str | Path) -> list[Any]:
    """Fill `models` from a Megatron checkpoint and nothing else, whatever the run loads later."""
    from megatron.training import get_args

    args = get_args()
    wanted = {"load": str(folder), "finetune": True, "no_load_optim": True, "no_load_rng": True}
    wanted |= {"ckpt_step": None}
    before = {name: getattr(args, name) for name in wanted}
    vars(args).update(wanted)
    try:
        checkpointing.load_checkpoint(models, None, None)
    finally:
        vars(args).update(before)
    return models


def save_mcore(models: list[Any], folder: str | Path, weights: Weights | None = None) -> None:
    """Write `models` as iteration 1 of a Megatron checkpoint; collective.

    `weights` knows the values of weights that have none yet.
    """
    from megatron.training import get_args

    get_args().save = str(folder)
    ranks = mpu.get_data_parallel_group(with_context_parallel=True)
    strategy = SharedOut(StreamingSave(weights or Whole()), ranks)
    context = {"save_strategy": strategy}
    checkpointing.save_checkpoint(1, models, None, None, 0, checkpointing_context=context)
