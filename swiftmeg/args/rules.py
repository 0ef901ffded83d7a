"""Values of training flags, and combinations of them, that cannot work.

Checked before anything heavy is imported. Where a rule only holds for the machine that trains, a
dry run, which plans for another one, leaves it out.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swiftmeg import platform
from swiftmeg.errors import UserError, typed
from swiftmeg.models.hf import HFModel

LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "micro_batch_size", "global_batch_size", "train_iters", "max_epochs", "log_interval",
            "save_interval", "save_total_limit", "ckpt_step",
            "eval_interval", "max_length", "seq_length", "recompute_num_layers",
            "lr_decay_iters", "exit_interval", "exit_duration_in_mins", "dataset_num_proc",
            "distributed_timeout_minutes", "tensorboard_log_interval", "tensorboard_queue_size",
            "fp8_amax_history_len", "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
        ),
        (1, float("inf")),
    ),
    **dict.fromkeys(
        ("num_workers", "shuffle_buffer_size", "lr", "min_lr", "lr_warmup_iters", "weight_decay",
         "clip_grad", "adam_eps", "manual_gc_interval"),
        (0, float("inf")),
    ),
    **dict.fromkeys(
        ("lr_warmup_fraction", "optimizer_offload_fraction", "adam_beta1", "adam_beta2",
         "sgd_momentum", "attention_dropout", "hidden_dropout", "split_dataset_ratio"),
        (0, 1),
    ),
    "eval_iters": (-1, float("inf")),
}  # fmt: skip
"""Smallest and largest value of a flag."""

BELOW_ONE = (
    "adam_beta1",
    "adam_beta2",
    "sgd_momentum",
    "attention_dropout",
    "hidden_dropout",
    "split_dataset_ratio",
)
"""Flags whose largest value is excluded."""


@dataclass
class Needs:
    """`flag`, where `when` holds for its value, needs the flags `others` at these values."""

    flag: str
    when: Callable[[Any], bool]
    others: dict[str, Any]


def _is(value: Any) -> Callable[[Any], bool]:
    return lambda given: given == value


def _is_not(value: Any) -> Callable[[Any], bool]:
    return lambda given: given != value


FP8_MULTIPLE = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""What sizes and numbers of tokens are multiples of in FP8 products, by recipe."""

_PRECISE = {"use_precision_aware_optimizer": True}
_FP8 = {"fp8_format": "hybrid or e4m3"}

NEEDS = (
    Needs("tp_comm_overlap", _is(True), {"sequence_parallel": True}),
    Needs("overlap_param_gather", _is(True),
          {"overlap_grad_reduce": True, "use_distributed_optimizer": True}),
    Needs("optimizer", _is("sgd"), {"use_distributed_optimizer": False}),
    Needs("use_precision_aware_optimizer", _is(True), {"use_distributed_optimizer": True}),
    Needs("optimizer_cpu_offload", _is(True), _PRECISE),
    Needs("optimizer_offload_fraction", _is_not(1.0), {"optimizer_cpu_offload": True}),
    *(Needs(name, _is_not("fp32"), _PRECISE)
      for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")),
    Needs("recompute_granularity", _is("full"),
          {"recompute_method": "uniform or block", "recompute_num_layers": "a number, e.g. 1"}),
    Needs("recompute_modules", _is_not(None), {"recompute_granularity": "selective"}),
    Needs("recompute_method", _is_not(None), {"recompute_granularity": "full"}),
    Needs("recompute_num_layers", _is_not(None), {"recompute_granularity": "full"}),
    Needs("manual_gc_interval", _is_not(0), {"manual_gc": True}),
    Needs("fp8_recipe", _is_not("delayed"), _FP8),
    Needs("fp8_amax_history_len", _is_not(1024), _FP8),
    Needs("fp8_amax_compute_algo", _is_not("max"), _FP8),
    Needs("fp8_param_gather", _is(True), _FP8 | {"use_distributed_optimizer": True}),
    Needs("streaming", _is(True), {"train_iters": "a number, the most steps to make"}),
    Needs("shuffle_buffer_size", _is_not(1000), {"streaming": True}),
    Needs("dataloader_type", _is("external"), {"streaming": True}),
)  # fmt: skip
"""Which flags need others. A wanted value that is text names the choices: any value but None."""

TRANSFORMER_ENGINE = ("tp_comm_overlap", "use_precision_aware_optimizer", "fp8_format")
"""Flags that only TransformerEngine acts on, and only on a GPU."""

DISCARDED = ("layernorm", "moe_act")
"""--recompute_modules whose output is given up and made again: TransformerEngine's layers alone."""

EXCLUSIVE = (
    ("lr_warmup_fraction", "lr_warmup_iters"),
    ("fp16", "bf16"),
    ("fp16", "fp8_format"),
    ("deterministic_mode", "cross_entropy_loss_fusion"),
    ("deterministic_mode", "tp_comm_overlap"),
    ("streaming", "lazy_tokenize"),
    ("packing", "lazy_tokenize"),
)
"""Pairs of flags of which one at most may be on."""

REFUSED = {
    ("cross_entropy_fusion_impl", "te"): "Megatron has switched it off, because training diverged "
    "with it: use native",
    ("ckpt_format", "torch"): "such checkpoints load in the layout that wrote them alone, and "
    "torch_dist's load in any: use torch_dist",
    ("ckpt_format", "zarr"): "it is gone from Megatron: use torch_dist",
}
"""Values that never work, with the reason."""

NATIVE = ("native", "local")
"""Names of native layers as values of --transformer_impl."""

RECOMPUTE_MODULES = {
    "core_attn": None,
    "layernorm": None,
    "mlp": None,
    "mla_up_proj": "multi_latent_attention",
    "moe": "num_experts",
    "moe_act": "num_experts",
    "shared_experts": "moe_shared_expert_intermediate_size",
}
"""What --recompute_modules may name, each with what the model must have for it."""


def check_combinations(args: Any, model: HFModel) -> None:
    """UserError for the first value or combination of `args` that cannot work."""
    for name, (low, high) in LIMITS.items():
        _check_limit(name, getattr(args, name), low, high)
    for rule in NEEDS:
        _check_needs(rule, args)
    for one, other in EXCLUSIVE:
        if getattr(args, one) and getattr(args, other):
            raise UserError(
                f"--{one} {typed(getattr(args, one))} and --{other} "
                f"{typed(getattr(args, other))} exclude each other: drop one"
            )
    for (name, value), reason in REFUSED.items():
        if getattr(args, name) == value:
            raise UserError(f"--{name} {value}: {reason}")
    _check_layers(args)
    _check_recompute_modules(args, model)
    _check_learning_rate(args)
    _check_fp8(args, model)
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"--wandb_project {args.wandb_project} needs the package wandb: install "
            "swiftmeg[wandb] or drop it"
        )


def check_machine(args: Any) -> None:
    """UserError for the first flag of `args` that this machine cannot act on."""
    if args.distributed_backend not in (None, platform.backend()):
        raise UserError(
            f"--distributed_backend {args.distributed_backend}: ranks talk through nccl with GPUs "
            "and through gloo without GPUs: drop it"
        )
    for flag in _of_transformer_engine(args):
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError(f"{flag} needs TransformerEngine: install swiftmeg[te] or drop it")
        if not platform.has_cuda():
            raise UserError(f"{flag} needs a GPU: drop it")
    if args.attention_backend == "local" and args.transformer_impl not in NATIVE:
        usable = platform.has_cuda() and importlib.util.find_spec("transformer_engine") is not None
        if usable or args.transformer_impl is not None:
            raise UserError(
                "--attention_backend local is that of native layers: set --transformer_impl native "
                "too, or use flash, fused, unfused or auto"
            )
    if args.fp16 and not platform.has_cuda():
        raise UserError("fp16 training needs a GPU: pass --torch_dtype float32 or bfloat16")


def _of_transformer_engine(args: Any) -> list[str]:
    """The flags of `args`, with their values, that only TransformerEngine acts on."""
    flags = [
        f"--{name} {typed(value)}"
        for name in TRANSFORMER_ENGINE
        if (value := getattr(args, name)) not in (None, False)
    ]
    modules = [name for name in args.recompute_modules or () if name in DISCARDED]
    return flags + [f"--recompute_modules {name}" for name in modules]


def _check_layers(args: Any) -> None:
    """UserError where a flag of TransformerEngine's meets native layers, on whatever machine."""
    for flag in _of_transformer_engine(args) if args.transformer_impl in NATIVE else ():
        raise UserError(
            f"{flag} needs --transformer_impl transformer_engine: set it or drop {flag.split()[0]}"
        )


def _check_limit(name: str, value: Any, low: float, high: float) -> None:
    if value is None or low <= value < high or (value == high and name not in BELOW_ONE):
        return
    bounds = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
    below = f", {high:g} excluded" if name in BELOW_ONE else ""
    raise UserError(f"--{name} {value}: must be {bounds}{below}")


def _check_needs(rule: Needs, args: Any) -> None:
    value = getattr(args, rule.flag)
    if not rule.when(value):
        return
    missing = {
        name: wanted
        for name, wanted in rule.others.items()
        if (getattr(args, name) is None if isinstance(wanted, str) and " " in wanted
            else getattr(args, name) != wanted)
    }  # fmt: skip
    if missing:
        needed = " and ".join(f"--{name} {typed(wanted)}" for name, wanted in missing.items())
        raise UserError(
            f"--{rule.flag} {typed(value)} needs {needed}: set it or drop --{rule.flag}"
        )


def _check_recompute_modules(args: Any, model: HFModel) -> None:
    for name in args.recompute_modules or ():
        if name not in RECOMPUTE_MODULES:
            raise UserError(
                f"--recompute_modules {name}: there is no such module; choose from "
                f"{', '.join(RECOMPUTE_MODULES)}"
            )
        needed = RECOMPUTE_MODULES[name]
        if needed is not None and not model.megatron_args.get(needed):
            raise UserError(
                f"--recompute_modules {name}: --model {model.folder} has none (its {needed} is "
                "not set): drop it"
            )


def _check_learning_rate(args: Any) -> None:
    lr = args.peak_lr
    if args.min_lr > lr:
        raise UserError(f"--min_lr {args.min_lr} is above --lr {lr}: lower it")
    decay = args.lr_decay_iters or args.train_iters
    if decay is not None and args.lr_warmup_iters >= decay:
        name = "lr_decay_iters" if args.lr_decay_iters else "train_iters"
        raise UserError(
            f"--lr_warmup_iters {args.lr_warmup_iters} must be below --{name} {decay}: lower it"
        )


def _check_fp8(args: Any, model: HFModel) -> None:
    if args.fp8_format is None:
        return
    tp = args.tensor_model_parallel_size
    built = model.megatron_args
    heads, groups = built["num_attention_heads"], built["num_query_groups"]
    widths = {
        "hidden_size": built["hidden_size"],
        "intermediate_size / TP": built["ffn_hidden_size"] / tp,
        "rows of q, k and v / TP": (heads + 2 * groups) * built["kv_channels"] / tp,
    }
    if "linear_attention_freq" in built:
        keys, values = built["linear_num_key_heads"], built["linear_num_value_heads"]
        rows = keys * built["linear_key_head_dim"] + values * (built["linear_value_head_dim"] + 1)
        widths["rows of linear attention's inputs / TP"] = 2 * rows / tp
    for name, width in widths.items():
        if width % FP8_MULTIPLE[args.fp8_recipe]:
            raise UserError(
                f"--fp8_format {args.fp8_format} with --fp8_recipe {args.fp8_recipe} needs sizes "
                f"that are multiples of {FP8_MULTIPLE[args.fp8_recipe]}, but --model "
                f"{model.folder} has {name} = {width:g}: drop it, or change the recipe or "
                "--tensor_model_parallel_size"
            )
    if args.fp8_param_gather and args.optimizer_cpu_offload and args.fp8_recipe != "delayed":
        raise UserError(
            f"--fp8_param_gather true with --optimizer_cpu_offload true needs --fp8_recipe "
            f"delayed, not {args.fp8_recipe}: set it or drop one"
        )
    if args.fp8_recipe == "delayed" and "layernorm" in (args.recompute_modules or ()):
        raise UserError(
            "--recompute_modules layernorm and --fp8_recipe delayed exclude each other: drop one"
        )
