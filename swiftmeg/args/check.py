"""Checks of argument combinations, made before anything heavy is imported or started."""

import math
import re
import tempfile
from pathlib import Path
from typing import Any

from swiftmeg.args.adapter_config import RESIDUAL_STARTS
from swiftmeg.args.pipeline import check_interleaving, check_pipeline
from swiftmeg.args.resolve import read_args_file, world_size
from swiftmeg.args.rules import check_combinations, check_machine
from swiftmeg.checkpoint import check_checkpoint, find_start, is_empty
from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel


def check_writable(flag: str, folder: Path) -> None:
    """UserError unless `folder` takes new files, or can be made where it does not exist."""
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir():
            raise UserError(f"{flag} {folder}: {nearest} is a file: name a folder")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be written to ({error.strerror}): name another folder"
        ) from None


def check_layout(args: Any, model: HFModel) -> int:
    """Check parallel sizes against the model and the job; returns the data-parallel size."""
    built = model.megatron_args
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp = getattr(args, "context_parallel_size", 1)
    world = world_size()
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    if cp != 1:
        sizes["context_parallel_size"] = cp
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if world % (needed := tp * pp * cp):
        processes = "1 process" if world == 1 else f"{world} processes"
        product = " x ".join(f"--{name} {value}" for name, value in sizes.items())
        raise UserError(
            f"{processes} cannot be split into {product} = {needed}: start a multiple of {needed} "
            "processes (NPROC_PER_NODE x NNODES) or lower the sizes"
        )
    _check_experts(args, built, world)
    heads, groups = built["num_attention_heads"], built["num_query_groups"]
    if heads % tp:
        raise UserError(_cannot_split("num_attention_heads", heads, tp))
    if groups % tp and tp % groups:
        raise UserError(_cannot_split("num_key_value_heads", groups, tp))
    if "linear_attention_freq" in built:
        _check_linear_attention(built["linear_num_key_heads"], tp, cp)
    has_mlp = built.get("num_experts") is None or "0" in str(built.get("moe_layer_freq", 1))
    if has_mlp and built["ffn_hidden_size"] % tp:
        raise UserError(_cannot_split("intermediate_size", built["ffn_hidden_size"], tp))
    check_pipeline(args, built["num_layers"])
    return world // needed


def _check_linear_attention(heads: int, tp: int, cp: int) -> None:
    """UserError unless every rank gets as many heads of linear attention."""
    if heads % tp:
        raise UserError(_cannot_split("linear_num_key_heads", heads, tp))
    if heads % (tp * cp):
        raise UserError(
            f"--tensor_model_parallel_size {tp} x --context_parallel_size {cp} does not divide the "
            f"model's linear_num_key_heads={heads}: lower one"
        )


def _check_experts(args: Any, built: dict[str, Any], world: int) -> None:
    """UserError unless the experts can be split as the arguments say."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    experts = built.get("num_experts")
    for name, value in (("expert_model_parallel_size", ep), ("expert_tensor_parallel_size", etp)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
        if value is not None and value > 1 and experts is None:
            raise UserError(f"--{name} {value}: the model has no experts: drop it")
    if experts is None:
        return
    etp = etp or tp
    if experts % ep:
        raise UserError(
            f"--expert_model_parallel_size {ep} does not divide the model's {experts} experts: "
            "use a divisor"
        )
    for name, flag, size in (
        ("moe_ffn_hidden_size", "expert_tensor_parallel_size", etp),
        ("moe_shared_expert_intermediate_size", "tensor_model_parallel_size", tp),
    ):
        if (built.get(name) or 0) % size:
            raise UserError(
                f"--{flag} {size} does not divide the model's {name}={built[name]}: use a divisor"
            )
    if world % (ep * etp * pp):
        raise UserError(
            f"{world} processes cannot be split into --expert_model_parallel_size {ep} x "
            f"--expert_tensor_parallel_size {etp} x --pipeline_model_parallel_size {pp} = "
            f"{ep * etp * pp}: start a multiple of {ep * etp * pp} processes or lower the sizes "
            "(--expert_tensor_parallel_size is --tensor_model_parallel_size unless it is set)"
        )


def _cannot_split(name: str, value: int, tp: int) -> str:
    return (
        f"--tensor_model_parallel_size {tp} does not divide the model's {name}={value}: "
        "use a divisor"
    )


def check_training(args: Any, model: HFModel) -> None:
    """UserError for the first combination of training arguments that cannot work."""
    if not args.dataset and not args.dry_run:
        raise UserError("--dataset is needed: name at least one file, folder or hub id")
    if args.max_epochs is None and args.train_iters is None and not args.dry_run:
        raise UserError("--max_epochs or --train_iters is needed: set one")
    for name in ("seed", "data_seed"):
        check_seed(name, getattr(args, name))
    _check_freezing(args)
    _check_lora(args)
    check_combinations(args, model)
    if not args.dry_run:
        check_machine(args)
    dp = check_layout(args, model)
    check_batch(args, dp)
    check_interleaving(args, model.megatron_args["num_layers"], dp)


def check_seed(name: str, seed: int) -> None:
    """UserError unless NumPy's generators take `seed`, the value of flag `name`."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--{name} {seed}: must be from 0 to {2**32 - 1}")


def check_batch(args: Any, dp: int) -> None:
    """UserError unless `dp` data-parallel ranks can share the global batch."""
    batch = args.micro_batch_size * dp
    if args.global_batch_size % batch:
        raise UserError(
            f"--global_batch_size {args.global_batch_size} must be a multiple of "
            f"--micro_batch_size {args.micro_batch_size} x {dp} data-parallel ranks: change one"
        )


def _check_freezing(args: Any) -> None:
    ratio = args.freeze_parameters_ratio
    if not 0 <= ratio <= 1:
        raise UserError(f"--freeze_parameters_ratio {ratio}: must be from 0 to 1")
    if ratio == 1 and not (args.trainable_parameters or args.trainable_parameters_regex):
        raise UserError(
            "--freeze_parameters_ratio 1 freezes every parameter: name those to train by "
            "--trainable_parameters or --trainable_parameters_regex, or lower it"
        )
    for name in ("pipeline_model_parallel_size", "expert_model_parallel_size"):
        if ratio and (size := getattr(args, name)) > 1:
            raise UserError(
                f"--freeze_parameters_ratio {ratio} needs the whole model on every rank, but "
                f"--{name} is {size}: name the parameters by --freeze_parameters"
            )
    if not args.freezes and (args.trainable_parameters or args.trainable_parameters_regex):
        raise UserError(
            "--trainable_parameters excepts parameters from freezing, and nothing is frozen: set "
            "--freeze_parameters, --freeze_parameters_regex or --freeze_parameters_ratio"
        )
    for name in ("freeze_parameters_regex", "trainable_parameters_regex"):
        check_regex(name, getattr(args, name))


def _check_lora(args: Any) -> None:
    if not args.is_lora:
        if args.adapter_load:
            raise UserError(
                f"--adapter_load {args.adapter_load} needs --train_type lora: set it or drop it"
            )
        if args.lorap_lr_ratio is not None:
            raise UserError(
                f"--lorap_lr_ratio {args.lorap_lr_ratio} needs --train_type lora: set it or drop it"
            )
        return
    if args.freezes:
        raise UserError(
            "--train_type lora freezes every weight: drop --freeze_parameters, "
            "--freeze_parameters_regex and --freeze_parameters_ratio"
        )
    for name in ("tp_comm_overlap", "moe_shared_expert_overlap"):
        if getattr(args, name):
            raise UserError(
                f"--{name} true changes how layers communicate, which their adapters do not "
                "follow: drop it with --train_type lora"
            )
    starts = ("true", "gaussian", *(RESIDUAL_STARTS if args.adapters or args.adapter_load else ()))
    if args.init_lora_weights not in starts:
        raise UserError(
            f"--init_lora_weights {args.init_lora_weights}: new adapters begin as true or gaussian "
            "say: for another start let PEFT make the adapter, save it and name it by --adapters"
        )
    if args.init_lora_weights in RESIDUAL_STARTS and args.load is not None:
        raise UserError(
            f"--load {args.load}: an adapter with init_lora_weights {args.init_lora_weights} needs "
            "the Hugging Face weights that it was made from: name them by --model and drop --load"
        )
    if args.lora_rank < 1:
        raise UserError(f"--lora_rank {args.lora_rank}: must be at least 1")
    for name, pattern, right in (
        ("rank_pattern", args.rank_pattern, _is_rank),
        ("alpha_pattern", args.alpha_pattern, _is_number),
    ):
        for key, value in pattern.items():
            check_regex(name, key)
            if not right(value):
                raise UserError(f"--{name}: {key} has {value!r}, not a number above 0")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora_dropout {args.lora_dropout}: must be from 0 to below 1")
    if args.lorap_lr_ratio is not None and not 0 < args.lorap_lr_ratio < math.inf:
        raise UserError(
            f"--lorap_lr_ratio {args.lorap_lr_ratio}: must be above 0; LoRA+ needs at least 1, "
            "such as 16"
        )
    check_regex("target_regex", args.target_regex)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def check_regex(name: str, pattern: str | None) -> None:
    """UserError unless `pattern`, the value of flag `name`, is a regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"--{name} {pattern}: not a regular expression ({error})") from None


def checkpoint_defaults(args: Any, sources: dict[str, str]) -> str | None:
    """Check the checkpoints to start from; do not load what the one to continue does not hold.

    A checkpoint of `swift export` holds weights only, so training starts at step 0 from it. Returns
    a note where another iteration than the latest is loaded.
    """
    if args.load is not None and read_args_file(args.load).get("train_type") == "lora":
        raise UserError(
            f"--load {args.load} holds adapters alone: name it by --adapter_load, and the weights "
            "that they were trained on by --load or --model"
        )
    if args.is_lora and args.load is not None:
        args.load = str(check_checkpoint("--load", args.load))
    args.adapter_load = args.adapter_load or None  # scripts say "" for none
    flag, folder = f"--{args.continued}", getattr(args, args.continued)
    if folder is None:
        return None
    if not args.exit_on_missing_checkpoint and is_empty(folder):
        setattr(args, args.continued, None)
        return f"{flag} {folder}: no checkpoint yet: starting from --model"
    path, args.ckpt_step, note = find_start(flag, folder, args.ckpt_step)
    setattr(args, args.continued, str(path))
    saved = read_args_file(path)
    absent = {
        "finetune": saved.get("to_mcore", False),
        "no_load_optim": saved.get("no_save_optim", False),
        "no_load_rng": saved.get("no_save_rng", False),
    }
    for name, missing in absent.items():
        if missing and not getattr(args, name):
            setattr(args, name, True)
            sources[name] = "the checkpoint holds no more"
    return note
