"""Megatron's namespace for a training run."""

import argparse
import logging
import math
from typing import Any, Protocol

from swiftmeg import platform
from swiftmeg.args.moe import expert_flags, prediction_flags
from swiftmeg.args.namespace import (
    layout_attributes,
    megatron_flags,
    megatron_namespace,
    model_flags,
)
from swiftmeg.errors import UserError
from swiftmeg.models.build import padded_vocab_size
from swiftmeg.models.hf import HFModel
from swiftmeg.models.layers import choose_backend
from swiftmeg.models.rope import rope_types
from swiftmeg.trainers.data import length_multiple


class DataSizes(Protocol):
    """What the data decide of Megatron's arguments."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, or of a pack."""

    @property
    def train_iters(self) -> int | None:
        """Optimizer steps."""

    @property
    def eval_iters(self) -> int:
        """Batches per evaluation."""


def training_namespace(
    args: Any, model: HFModel, data: DataSizes, changes: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Combine flags, the model's arguments and what the data say; sets Megatron's globals.

    `changes` are the training method's own arguments of Megatron.
    """
    backend = choose_backend(args.transformer_impl)
    flags = model_flags(model.megatron_args)
    given = {k: v for k, v in megatron_flags(args).items() if v is not None}
    flags |= given
    flags |= expert_flags(args, model.megatron_args, fused=backend == "transformer_engine")
    flags |= prediction_flags(model.megatron_args)
    multiple = length_multiple(args)
    seq_length = args.seq_length or math.ceil(data.longest / multiple) * multiple
    flags |= {
        "seq_length": seq_length,
        "max_position_embeddings": max(flags["max_position_embeddings"], seq_length),
        "train_iters": data.train_iters,
        "eval_iters": data.eval_iters,
        "eval_interval": args.eval_interval or args.save_interval,
        "tensorboard_dir": None,  # set when training begins: naming it creates the folder
        "transformer_impl": "transformer_engine" if backend == "transformer_engine" else "local",
        "dataloader_type": "external",
        "lr": args.peak_lr,
        "load": getattr(args, args.continued),
        "fp16": args.fp16,
        "bf16": args.bf16,
        "logging_level": _logging_level(args.logging_level),
        # A resumed run may be longer than the one that was saved: this run's flags decide.
        "override_opt_param_scheduler": True,
        "dist_ckpt_optim_fully_reshardable": True,
        # Random states of every data-parallel rank in checkpoints, and dropout of its own on each.
        "data_parallel_random_init": True,
        # Megatron's own writer: the other needs a package of its own.
        "async_strategy": "mcore",
        "use_persistent_ckpt_worker": args.async_save and platform.has_cuda(),
        "distributed_backend": args.distributed_backend or platform.backend(),
        "no_rope_fusion": _no_rope_fusion(args, backend, model),
        "no_gradient_accumulation_fusion": not _accumulates(args),
        "no_persist_layer_norm": backend == "native",
        # Megatron knows `local` for its own layers alone; native ones have their own attention.
        "attention_backend": args.attention_backend.replace("local", "auto"),
    }
    flags |= changes or {}
    # Megatron's own name for it is an attribute that it works out.
    parts = flags.pop("virtual_pipeline_model_parallel_size", None)
    flags["num_virtual_stages_per_pipeline_rank"] = parts if (parts or 1) > 1 else None
    if args.recompute_granularity == "selective" and args.recompute_modules is None:
        flags["recompute_modules"] = ["core_attn"]
        if _has_fused_attention(args):
            del flags["recompute_granularity"]
    elif args.recompute_granularity == "none":
        del flags["recompute_granularity"]
    vocabulary = padded_vocab_size(
        model.megatron_args["vocab_size"], args.tensor_model_parallel_size
    )
    attributes = layout_attributes(
        model.megatron_args,
        vocabulary,
        backend,
        accumulate=_accumulates(args),
        in_blocks=args.cross_entropy_loss_fusion is not False,
    )
    namespace = megatron_namespace(flags, args.extra_megatron_kwargs, attributes)
    # Megatron switches it off without a worker of its own, which takes tensors over shared memory:
    # on CPUs training would change them while they are written. There a forked process writes.
    namespace.async_save = args.async_save
    # Megatron would run the step again, and save the weights of a run that has diverged:
    # trainers/divergence.py ends it.
    namespace.check_for_nan_in_loss_and_grad = False
    namespace.moe_grouped_gemm = bool(namespace.num_experts) and args.moe_grouped_gemm
    _keep_lists(namespace, args)
    return namespace


def _keep_lists(namespace: argparse.Namespace, args: Any) -> None:
    """Undo that Megatron takes the only type of balancing out of its list.

    Its log looks for `aux_loss` in it, and would find that in the name `seq_aux_loss` too.
    """
    if any(args.moe_aux_loss_coeff or ()):
        namespace.moe_router_load_balancing_type = args.moe_router_load_balancing_type
        namespace.moe_aux_loss_coeff = args.moe_aux_loss_coeff


def _logging_level(name: str | None) -> int | None:
    """Megatron takes a number, users write names too."""
    if name is None or name.isdecimal():
        return None if name is None else int(name)
    levels = logging.getLevelNamesMapping()
    if name.upper() not in levels:
        raise UserError(f"--logging_level {name}: use a number or one of {', '.join(levels)}")
    return levels[name.upper()]


def _no_rope_fusion(args: Any, backend: str, model: HFModel) -> bool:
    """TransformerEngine's kernel cannot scale cosine and sine, as yarn does, nor turn a part of a
    latent head's query."""
    if args.no_rope_fusion:
        return True
    built = model.megatron_args
    unfused = built.get("multi_latent_attention") or built.get("rotary_interleaved")
    return backend == "native" or "yarn" in rope_types(model.hf_config).values() or bool(unfused)


def _has_fused_attention(args: Any) -> bool:
    """Whether attention keeps no scores, so that computing it again would save nothing."""
    return (args.bf16 or args.fp16) and args.attention_backend not in ("unfused", "local")


def _accumulates(args: Any) -> bool:
    """Whether products add weight gradients to Megatron's buffers."""
    return platform.has_cuda() and not args.no_gradient_accumulation_fusion
