"""Every flag of training and conversion does something, shown by one row each.

A row of TRAINING or CONVERSION names the flag, a value that is not its default, and what shows its
effect; a flag without a row fails, and so does a documented one that is not declared.
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swiftmeg.args.aliases import aliases_of
from swiftmeg.args.check import check_training, checkpoint_defaults
from swiftmeg.args.commands import ExportArguments, PtArguments, RlhfArguments, SftArguments
from swiftmeg.args.effects import notes
from swiftmeg.args.moe import expert_flags
from swiftmeg.args.read import read_command, read_training_arguments
from swiftmeg.args.unsupported import ACCEPTED, OFF, accepted_flags, default_of, planned_flags
from swiftmeg.data.sources import registry
from swiftmeg.errors import UserError
from swiftmeg.export.convert import check_export
from swiftmeg.models.layers import choose_backend
from tests.args.documented import NAMES
from tests.ranks import run_ranks
from tests.tiny import save_model

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Sets:
    """The flag sets attributes of Megatron's namespace; not the same without it."""

    value: Any
    attribute: str
    expected: Any = ...
    flags: dict[str, Any] = field(default_factory=dict)
    """Flags that it needs."""


@dataclass
class Changes:
    """The flag changes what `of` finds in the run; `becomes` says to what, if given."""

    value: Any
    of: Callable[["Context"], Any]
    becomes: Any = ...
    flags: dict[str, Any] = field(default_factory=dict)


@dataclass
class Refused:
    """The flag ends the command in a line that matches."""

    value: Any
    line: str
    flags: dict[str, Any] = field(default_factory=dict)


@dataclass
class Says:
    """The flag is accepted without effect, and the run says so at start in a line that matches."""

    value: Any
    line: str
    flags: dict[str, Any] = field(default_factory=dict)


@dataclass
class ShownBy:
    """A test of its own, in `file`, sets the flag or passes the argument."""

    file: str
    test: str


Row = Sets | Changes | Refused | Says | ShownBy


@dataclass
class Context:
    """A command read as far as it goes without Megatron."""

    args: Any
    sources: dict[str, str]
    model: Any

    def data(self) -> Any:
        from swiftmeg.trainers.methods import METHODS

        return METHODS["sft"].prepare_data(self.args, self.model)


def train_rows(context: Context) -> Any:
    """The training rows' tokens and labels, packs as they are."""
    return [str(row) for row in context.data().train]


def kind_of_data(context: Context) -> Any:
    return type(context.data().train).__name__


def stream_order(context: Context) -> Any:
    return [row[1][1][0] for row in context.data().train.epoch(0)]


def validation_rows(context: Context) -> Any:
    rows = context.data().validation
    return None if rows is None else [list(row["input_ids"]) for row in rows]


def trained_tokens(context: Context) -> Any:
    return [list(row["labels"]) for row in context.data().train]


def train_iters(context: Context) -> Any:
    return context.data().train_iters


def argument(name: str) -> Callable[[Context], Any]:
    return lambda context: getattr(context.args, name)


def config(name: str) -> Callable[[Context], Any]:
    """A value of the transformers config that the model is built from."""
    return lambda context: getattr(context.model.hf_config, name)


def theta(context: Context) -> Any:
    return context.model.hf_config.rope_parameters["rope_theta"]


def scaling(context: Context) -> Any:
    rope = context.model.hf_config.rope_parameters
    return rope["rope_type"], rope.get("factor")


def environ(name: str) -> Callable[[Context], Any]:
    def read(context: Context) -> Any:
        import os

        return os.environ.pop(name, None)

    return read


def save_root(context: Context) -> Any:
    from swiftmeg.trainers.start import save_root as root

    return root(context.args, context.model).name


def versioned(context: Context) -> Any:
    from swiftmeg.claim import claim, release

    root = Path("out-of-claims").resolve()
    folder = claim(root, context.args.add_version)
    release(root)
    return "flat" if folder == root else "versioned"


def written_token(context: Context) -> Any:
    from swiftmeg.args.resolve import write_args_file

    folder = Path("written")
    write_args_file(folder, context.args, context.sources)
    assert context.args.hub_token is None or "secret" not in (folder / "args.json").read_text()
    return context.args.hub_token


def export_target(context: Context) -> Any:
    return check_export(context.args, context.model)[0].name


def export_shard(context: Context) -> Any:
    return check_export(context.args, context.model)[1]


def permutes_fused(context: Context) -> Any:
    """Whether tokens would be sorted in one kernel where TransformerEngine is there."""
    return expert_flags(context.args, context.model.megatron_args, True)["moe_permute_fusion"]


def turns_fused(context: Context) -> Any:
    """Whether heads would be turned in one kernel where TransformerEngine is there."""
    from swiftmeg.trainers.training_namespace import _no_rope_fusion

    return not _no_rope_fusion(context.args, "transformer_engine", context.model)


def accumulates(context: Context) -> Any:
    """Whether TransformerEngine's layers would add up the gradients of weights themselves."""
    return context.args.no_gradient_accumulation_fusion is not True


SELF = {"dataset": ["self-cognition#8"], "model_name": ["Eve"], "model_author": ["Dan"]}
SCALE = '{"rope_type": "linear", "factor": 4.0}'
PP2 = {"pipeline_model_parallel_size": 2, "WORLD_SIZE": "2"}
ACCOUNTED = PP2 | {
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
TWO_SETS = {"dataset": ["rows.jsonl", "other.jsonl"]}
PRECISE = {"use_precision_aware_optimizer": True}
FP8 = {"fp8_format": "hybrid"}
MOE_SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
             "shared_expert_intermediate_size": 20}  # fmt: skip
MOE = {"model": "moe"}
MOE2 = MOE | {"WORLD_SIZE": "2"}

ARCHITECTURE: dict[str, Row] = {
    **{
        name: Refused(value, f"--{name} .* contradicts --model .*: drop it")
        for name, value in (
            ("num_experts", 8),
            ("moe_ffn_hidden_size", 8),
            ("moe_router_topk", 2),
            ("moe_shared_expert_intermediate_size", 8),
            ("moe_router_pre_softmax", True),
            ("moe_router_score_function", "sigmoid"),
            ("moe_router_enable_expert_bias", True),
            ("moe_router_topk_scaling_factor", 2.0),
            ("multi_latent_attention", True),
            ("q_lora_rank", 8),
            ("kv_lora_rank", 8),
            ("qk_head_dim", 8),
            ("qk_pos_emb_head_dim", 8),
            ("v_head_dim", 8),
        )
    },
    "moe_layer_freq": Refused("2", "--moe_layer_freq 2: .* has no experts: drop it"),
    "model_type": Refused(
        "llama",
        "--model_type llama contradicts .*Qwen3ForCausalLM.*qwen3_thinking",
        {"model": "qwen"},
    ),
    "num_layers": Refused(8, "--num_layers 8 contradicts .*num_layers=4: drop it"),
    "hidden_size": Refused(64, "weights have hidden_size=48"),
    "ffn_hidden_size": Refused(64, "weights have ffn_hidden_size=84"),
    "num_attention_heads": Refused(3, "weights have num_attention_heads=6"),
    "group_query_attention": Refused(False, "--group_query_attention false contradicts"),
    "num_query_groups": Refused(1, "weights have num_query_groups=3"),
    "kv_channels": Refused(32, "weights have kv_channels=16"),
    "position_embedding_type": Refused("none", "weights have position_embedding_type=rope"),
    "rotary_percent": Refused(0.5, "weights have rotary_percent=1.0"),
    "normalization": Refused("LayerNorm", "weights have normalization=RMSNorm"),
    "swiglu": Refused(False, "--swiglu false contradicts"),
    "untie_embeddings_and_output_weights": Refused(False, "--untie.* false contradicts"),
    "disable_bias_linear": Refused(False, "weights have disable_bias_linear=true"),
    "add_qkv_bias": Refused(True, "weights have add_qkv_bias=false"),
    "qk_layernorm": Refused(True, "weights have qk_layernorm=false"),
    "padded_vocab_size": Refused(2048, "weights have padded_vocab_size=1003"),
    "rotary_base": Changes(5000.0, theta, 5000.0),
    "rope_scaling": Changes(SCALE, scaling, ("linear", 4.0)),
    "max_model_len": Changes(2048, scaling, ("yarn", 4.0), {"rope_scaling": "yarn"}),
    "norm_epsilon": Changes(1e-3, config("rms_norm_eps"), 1e-3),
    "max_position_embeddings": Changes(900, config("max_position_embeddings"), 900),
    "mtp_num_layers": Refused(1, "LlamaForCausalLM has no multi-token prediction modules"),
}

SHARED: dict[str, Row] = {
    "model": Changes("qwen", lambda c: c.model.family.architecture, "Qwen3ForCausalLM"),
    "torch_dtype": Changes("bfloat16", argument("torch_dtype"), "bfloat16"),
    "trust_remote_code": Changes(True, lambda c: c.model.trust_remote_code, True),
    "model_revision": Refused("v1", "--model_revision v1 needs a hub id, but --model"),
    "external_plugins": Changes(["plugin.py"], environ("FROM_PLUGIN"), "1"),
    "custom_register_path": Changes(["plugin.py"], environ("FROM_PLUGIN"), "1"),
    "new_special_tokens": Changes(
        ["<x>"], lambda c: "<x>" in c.model.tokenizer().get_vocab(), True
    ),
    "model_kwargs": Changes({"from_kwargs": 1}, environ("FROM_KWARGS"), "1"),
    "decoder_first_pipeline_num_layers": Refused(1, "needs --pipeline_model_parallel_size above 1"),
    "decoder_last_pipeline_num_layers": Refused(1, "needs --pipeline_model_parallel_size above 1"),
} | ARCHITECTURE

DATA: dict[str, Row] = {
    "load_args": Changes(False, argument("system"), None, {"load": "ckpt"}),
    "load_data_args": Changes(True, argument("data_seed"), 7, {"load": "ckpt"}),
    "template": Changes("qwen", train_rows),
    "system": Changes("Be brief.", train_rows),
    "max_length": Changes(80, train_rows),
    "truncation_strategy": Changes("right", train_rows, flags={"max_length": 80}),
    "use_chat_template": Changes(False, train_rows),
    "loss_scale": Changes("all", trained_tokens),
    "agent_template": ShownBy("tests/data/test_named_templates.py", 'agent_template="hermes"'),
    "dataset": Changes(["other.jsonl"], train_rows),
    "val_dataset": Changes(["other.jsonl"], validation_rows),
    "val_dataset_shuffle": Changes(True, validation_rows, flags={"val_dataset": ["other.jsonl"]}),
    "dataloader_type": ShownBy("tests/trainers/test_data.py", "test_the_order_of_a_single_pass"),
    "split_dataset_ratio": Changes(0.25, lambda c: len(c.data().train), 9),
    "data_seed": Changes(3, train_rows),
    "dataset_num_proc": ShownBy("tests/data/test_encode.py", "test_rows_are_encoded_in_order"),
    "dataset_shuffle": Changes(False, train_rows),
    "interleave_prob": Changes([0.9, 0.1], train_rows, flags=TWO_SETS),
    "stopping_strategy": Changes(
        "all_exhausted", train_rows, flags=TWO_SETS | {"interleave_prob": [0.5, 0.5]}
    ),
    "columns": Changes({"frage": "query", "antwort": "response"}, train_rows,
                       flags={"dataset": ["mixed.jsonl"]}),
    "custom_dataset_info": Changes(["info.json"], train_rows, flags={"dataset": ["mixed.jsonl"]}),
    "strict": Refused(True, "--strict true: ", {"dataset": ["mixed.jsonl"]}),
    "model_name": Changes(["Ada"], train_rows, flags=SELF),
    "model_author": Changes(["Bob"], train_rows, flags=SELF),
    "use_hf": ShownBy("tests/cli/test_bad_input.py", "CASES"),
    "load_from_cache_file": ShownBy("tests/data/test_sources.py", "load_from_cache_file"),
    "download_mode": ShownBy("tests/data/test_sources.py", "force_redownload"),
    "hub_token": Changes("secret", written_token, "secret"),
    "streaming": Changes(True, kind_of_data, "RowStream"),
    "shuffle_buffer_size": Changes(2, stream_order, flags={"streaming": True}),
    "lazy_tokenize": Changes(True, kind_of_data, "LazyDataset"),
    "packing": Changes(True, train_rows, flags={"max_length": 300}),
    "padding_free": Changes(False, lambda c: c.data().collate.padding_free, False),
}  # fmt: skip

LOOP: dict[str, Row] = {
    "transformer_impl": Refused(
        "transformer_engine", "--transformer_impl transformer_engine needs"
    ),
    "dry_run": ShownBy("tests/planning/test_dry_run.py", '"dry_run": "true"'),
    "ddp_timeout": Changes(61, argument("distributed_timeout_minutes"), 2),
    "max_epochs": Changes(2, train_iters, 3, {"train_iters": 50}),
    "no_log_learning_rate_to_tensorboard": ShownBy(
        "tests/args/test_parameters.py", "test_the_learning_rate_can_be_left_out"
    ),
    "add_version": Changes(False, versioned, "flat"),
    "save_safetensors": ShownBy("tests/cli/test_resume.py", "save_safetensors"),
    "extra_megatron_kwargs": Sets({"log_num_zeros_in_grad": True}, "log_num_zeros_in_grad", True),
}

MEGATRON: dict[str, Row] = {
    "micro_batch_size": Sets(2, "micro_batch_size"),
    "global_batch_size": Sets(4, "global_batch_size"),
    "train_iters": Changes(7, train_iters, 7),
    "recompute_granularity": Sets("full", "recompute_granularity", "full", FULL),
    "recompute_method": Sets("uniform", "recompute_method", "uniform", FULL),
    "recompute_num_layers": Sets(1, "recompute_num_layers", 1, FULL),
    "recompute_modules": Sets(["core_attn", "mlp"], "recompute_modules"),
    "deterministic_mode": Sets(True, "deterministic_mode", flags={"NCCL_ALGO": "Ring"}),
    "log_interval": Sets(3, "log_interval"),
    "tensorboard_dir": ShownBy("tests/cli/test_guide.py", "--tensorboard_dir boards"),
    "cross_entropy_loss_fusion": Sets(True, "cross_entropy_loss_fusion"),
    "cross_entropy_fusion_impl": Refused("te", "Megatron has switched it off"),
    "calculate_per_token_loss": Sets(False, "calculate_per_token_loss"),
    "attention_backend": Sets("unfused", "attention_backend", "AttnBackend.unfused"),
    "optimizer": Sets("sgd", "optimizer", flags={"use_distributed_optimizer": False}),
    "optimizer_cpu_offload": Sets(True, "optimizer_cpu_offload", flags=PRECISE),
    "optimizer_offload_fraction": Sets(0.5, "optimizer_offload_fraction",
                                       flags=PRECISE | {"optimizer_cpu_offload": True}),
    "use_precision_aware_optimizer": Sets(True, "use_precision_aware_optimizer"),
    "main_grads_dtype": Sets("bf16", "main_grads_dtype", "torch.bfloat16", PRECISE),
    "main_params_dtype": Sets("fp16", "main_params_dtype", "torch.float16", PRECISE),
    "exp_avg_dtype": Sets("fp8", "exp_avg_dtype", "torch.uint8", PRECISE),
    "exp_avg_sq_dtype": Sets("fp8", "exp_avg_sq_dtype", "torch.uint8", PRECISE),
    "manual_gc": Sets(True, "manual_gc"),
    "manual_gc_interval": Sets(5, "manual_gc_interval", flags={"manual_gc": True}),
    "seed": Sets(5, "seed"),
    "num_workers": Sets(1, "num_workers"),
    "seq_length": Sets(128, "seq_length"),
    "use_cpu_initialization": Sets(True, "use_cpu_initialization"),
    "no_masked_softmax_fusion": Sets(True, "masked_softmax_fusion", False),
    "no_bias_dropout_fusion": Sets(True, "bias_dropout_fusion", False),
    "no_bias_swiglu_fusion": Sets(True, "bias_swiglu_fusion", False),
    "no_rope_fusion": Changes(True, turns_fused, False),
    "no_gradient_accumulation_fusion": Changes(True, accumulates, False),
    "exit_interval": Sets(4, "exit_interval"),
    "exit_duration_in_mins": Sets(60, "exit_duration_in_mins"),
    "exit_signal_handler": Sets(True, "exit_signal_handler"),
    "lr": Sets(3e-4, "lr"),
    "lr_decay_style": Sets("linear", "lr_decay_style"),
    "lr_decay_iters": Sets(40, "lr_decay_iters"),
    "lr_warmup_iters": Sets(2, "lr_warmup_iters"),
    "lr_warmup_fraction": Sets(0.1, "lr_warmup_fraction"),
    "min_lr": Sets(1e-7, "min_lr"),
    "weight_decay": Sets(0.2, "weight_decay"),
    "clip_grad": Sets(0.5, "clip_grad"),
    "adam_beta1": Sets(0.8, "adam_beta1"),
    "adam_beta2": Sets(0.9, "adam_beta2"),
    "adam_eps": Sets(1e-6, "adam_eps"),
    "sgd_momentum": Sets(0.5, "sgd_momentum"),
    "attention_dropout": Sets(0.3, "attention_dropout"),
    "hidden_dropout": Sets(0.2, "hidden_dropout"),
    "save": Changes("elsewhere", save_root, "elsewhere"),
    "save_interval": Sets(11, "save_interval"),
    "async_save": Sets(True, "async_save"),
    "save_total_limit": ShownBy("tests/cli/test_checkpoints.py", "save_total_limit"),
    "ckpt_step": Sets(1, "ckpt_step", flags={"load": "ckpt"}),
    "load": Sets("ckpt", "load"),
    "finetune": Sets(True, "finetune", flags={"load": "ckpt"}),
    "no_save_optim": Sets(True, "no_save_optim"),
    "no_save_rng": Sets(True, "no_save_rng"),
    "no_load_optim": Sets(True, "no_load_optim"),
    "no_load_rng": Sets(True, "no_load_rng"),
    "ckpt_format": Refused("torch", "--ckpt_format torch: .*the layout that wrote.*torch_dist"),
    "auto_detect_ckpt_format": Sets(False, "auto_detect_ckpt_format"),
    "no_check_for_nan_in_loss_and_grad": ShownBy(
        "tests/trainers/test_divergence.py", "test_a_run_goes_on_where_it_is_told_to"
    ),
    "exit_on_missing_checkpoint": Sets(False, "exit_on_missing_checkpoint"),
    "no_initialization": Sets(True, "perform_initialization", False),
    "distributed_backend": Refused("nccl", "--distributed_backend nccl: .* gloo without GPUs"),
    "use_distributed_optimizer": Sets(False, "use_distributed_optimizer"),
    "tensor_model_parallel_size": Sets(3, "tensor_model_parallel_size",
                                       flags={"WORLD_SIZE": "3"}),
    "pipeline_model_parallel_size": Sets(2, "pipeline_model_parallel_size",
                                         flags={"WORLD_SIZE": "2"}),
    "decoder_first_pipeline_num_layers": Sets(1, "decoder_first_pipeline_num_layers", flags=PP2),
    "decoder_last_pipeline_num_layers": Sets(1, "decoder_last_pipeline_num_layers", flags=PP2),
    "account_for_embedding_in_pipeline_split": Sets(
        True, "account_for_embedding_in_pipeline_split", flags=ACCOUNTED),
    "account_for_loss_in_pipeline_split": Sets(
        True, "account_for_loss_in_pipeline_split", flags=ACCOUNTED),
    "virtual_pipeline_model_parallel_size": Sets(
        2, "virtual_pipeline_model_parallel_size", flags=PP2),
    "num_layers_per_virtual_pipeline_stage": Sets(
        1, "num_layers_per_virtual_pipeline_stage", flags=PP2),
    "pipeline_model_parallel_layout": Sets(
        "E|t|t|L", "virtual_pipeline_model_parallel_size", 2, flags=PP2),
    "context_parallel_size": Sets(2, "context_parallel_size", flags={"WORLD_SIZE": "4"}),
    "sequence_parallel": Sets(True, "sequence_parallel",
                              flags={"tensor_model_parallel_size": 3, "WORLD_SIZE": "3"}),
    "tp_comm_overlap": Sets(True, "tp_comm_overlap",
                            flags={"sequence_parallel": True, "tensor_model_parallel_size": 3,
                                   "WORLD_SIZE": "3"}),
    "overlap_grad_reduce": Sets(True, "overlap_grad_reduce"),
    "overlap_param_gather": Sets(True, "overlap_param_gather", flags={"overlap_grad_reduce": True}),
    "distributed_timeout_minutes": Sets(7, "distributed_timeout_minutes"),
    "log_params_norm": Sets(True, "log_params_norm"),
    "log_throughput": Sets(True, "log_throughput"),
    "logging_level": Sets("error", "logging_level", 40),
    "tensorboard_log_interval": Sets(4, "tensorboard_log_interval"),
    "tensorboard_queue_size": Sets(9, "tensorboard_queue_size"),
    "log_timers_to_tensorboard": Sets(False, "log_timers_to_tensorboard"),
    "log_validation_ppl_to_tensorboard": Sets(False, "log_validation_ppl_to_tensorboard"),
    "log_memory_to_tensorboard": Sets(False, "log_memory_to_tensorboard"),
    "wandb_project": (
        Sets("p", "wandb_project", flags={"wandb_exp_name": "e"})
        if importlib.util.find_spec("wandb")
        else Refused("p", r"needs the package wandb: install swiftmeg\[wandb\]")
    ),
    "wandb_exp_name": Sets("e", "wandb_exp_name"),
    "wandb_save_dir": Sets("w", "wandb_save_dir"),
    "expert_model_parallel_size": Sets(2, "expert_model_parallel_size", flags=MOE2),
    "expert_tensor_parallel_size": Sets(2, "expert_tensor_parallel_size", flags=MOE2),
    "moe_router_dtype": Sets("fp64", "moe_router_dtype", flags=MOE),
    "moe_router_bias_update_rate": Sets(0.1, "moe_router_bias_update_rate", flags=MOE),
    "moe_router_load_balancing_type": Sets(["seq_aux_loss"], "moe_router_load_balancing_type",
                                           flags=MOE | {"moe_aux_loss_coeff": [0.1]}),
    "moe_aux_loss_coeff": Sets([0.1], "moe_aux_loss_coeff", flags=MOE),
    "moe_z_loss_coeff": Sets(0.1, "moe_z_loss_coeff", flags=MOE),
    "moe_expert_capacity_factor": Sets(1.5, "moe_expert_capacity_factor", flags=MOE),
    "moe_token_drop_policy": Sets("position", "moe_token_drop_policy", flags=MOE),
    "moe_pad_expert_input_to_capacity": Sets(True, "moe_pad_expert_input_to_capacity",
                                             flags=MOE | {"moe_expert_capacity_factor": 1.5}),
    "moe_token_dispatcher_type": ShownBy("tests/layouts/test_experts.py",
                                         '"moe_token_dispatcher_type": "allgather"'),
    "moe_enable_deepep": Refused(True, "needs --moe_token_dispatcher_type flex", flags=MOE),
    "moe_grouped_gemm": ShownBy("tests/models/test_experts.py", "grouped_product"),
    "moe_permute_fusion": Changes(False, permutes_fused, False, flags=MOE),
    "moe_shared_expert_overlap": Sets(True, "moe_shared_expert_overlap",
                                      flags=MOE | {"moe_token_dispatcher_type": "alltoall"}),
    "mtp_num_layers": Refused(1, "has no multi-token prediction"),
    "mtp_loss_scaling_factor": ShownBy("tests/layouts/test_predictions.py",
                                       '"mtp_loss_scaling_factor": 0.4'),
    "eval_iters": Sets(3, "eval_iters", flags={"split_dataset_ratio": 0.25}),
    "eval_interval": Sets(6, "eval_interval"),
    "fp16": Refused(True, "fp16 training needs a GPU"),
    "bf16": Sets(True, "bf16"),
    "attention_softmax_in_fp32": Sets(False, "attention_softmax_in_fp32"),
    **{
        name: ShownBy("tests/tuners/test_freezing.py", f'"{name}"')
        for name in (
            "freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio",
            "trainable_parameters", "trainable_parameters_regex",
        )
    },
    "adapters": ShownBy("tests/tuners/test_adapters.py", "adapters=start"),
    "adapter_load": Refused("nowhere", "--adapter_load nowhere: no LoRA checkpoint"),
    "lora_rank": Refused(0, "--lora_rank 0: must be at least 1", {"train_type": "lora"}),
    "init_lora_weights": Refused("pissa", "let PEFT make the adapter", {"train_type": "lora"}),
    "rank_pattern": Refused({"x": 0}, "--rank_pattern: x has 0", {"train_type": "lora"}),
    "alpha_pattern": Refused({"(": 1}, "not a regular expression", {"train_type": "lora"}),
    "lora_dropout": Refused(1.0, "must be from 0 to below 1", {"train_type": "lora"}),
    **{
        name: ShownBy("tests/tuners/lora_runs.py", f'"{name}"')
        for name in ("target_modules", "target_regex", "modules_to_save", "lora_bias", "use_rslora")
    },
    "use_dora": ShownBy("tests/tuners/test_dora.py", '"use_dora": "true"'),
    "lorap_lr_ratio": ShownBy("tests/tuners/test_lora.py", '"lorap_lr_ratio": 4'),
    "lora_alpha": ShownBy("tests/tuners/test_lora.py", "lora_alpha == 6"),
    "train_type": ShownBy("tests/tuners/lora_runs.py", '"train_type": "lora"'),
    "fp8_format": Sets("hybrid", "fp8"),
    "fp8_recipe": Sets("blockwise", "fp8_recipe", flags=FP8),
    "fp8_amax_history_len": Sets(1, "fp8_amax_history_len", flags=FP8),
    "fp8_amax_compute_algo": Sets("most_recent", "fp8_amax_compute_algo", flags=FP8),
    "fp8_param_gather": Sets(True, "fp8_param_gather", flags=FP8),
}  # fmt: skip

PLANNED: dict[str, Row] = {
    "packing_cache": ShownBy("tests/trainers/test_data.py", "test_flags_without_effect_are_noted"),
    "cached_dataset": Refused(["x"], "name the rows by --dataset"),
    "mlp_padding_free": Refused(True, "use --padding_free true"),
    "padding_side": ShownBy("tests/trainers/test_data.py", "test_flags_without_effect_are_noted"),
    "template_backend": Refused("jinja", "chat templates are jinja in any case"),
    "response_prefix": ShownBy(
        "tests/trainers/test_data.py", "test_flags_without_effect_are_noted"
    ),
    "task_type": Refused("seq_cls", "only causal_lm is supported yet"),
    "num_labels": Refused(2, "classifiers are not supported yet"),
    "problem_type": Refused("regression", "classifiers are not supported yet"),
    "attn_impl": Refused("sdpa", "in training --attention_backend"),
    "device_map": Refused("auto", "the parallel sizes place the weights"),
    "max_memory": Refused("1GB", "the parallel sizes place the weights"),
    "local_repo_path": Refused("x", "models come from --model alone"),
    "init_strategy": Refused("zero", "every weight must be in the folder"),
    **{
        name: Refused(value, "weights are not quantised")
        for name, value in (
            ("quant_method", "awq"), ("quant_bits", "4"), ("hqq_axis", 1),
            ("bnb_4bit_compute_dtype", "float16"), ("bnb_4bit_quant_type", "fp4"),
            ("bnb_4bit_use_double_quant", False), ("bnb_4bit_quant_storage", "uint8"),
        )
    },
    "safe_serialization": Refused(False, "weights are written as safetensors"),
    "tuner_backend": Refused("unsloth", "adapters are those of PEFT"),
    **{
        name: Says(value, f"--{name} .* has no effect: {ACCEPTED[name]}")
        for name, value in (
            ("apply_query_key_layer_scaling", True), ("local_rank", 0), ("report_to", ["none"]),
            ("check_model", False), ("ignore_args_error", True), ("remove_unused_columns", False),
            ("max_new_tokens", 9), ("temperature", 0.5), ("top_k", 9), ("top_p", 0.5),
            ("repetition_penalty", 1.5), ("num_beams", 2), ("stream", True),
            ("stop_words", ["x"]), ("logprobs", True), ("top_logprobs", 2),
        )
    },
}  # fmt: skip

TRAINING: dict[str, Row] = SHARED | DATA | LOOP | MEGATRON | PLANNED

TO_HF = {"to_mcore": None, "to_hf": True, "mcore_model": "ckpt"}
CONVERSION: dict[str, Row] = SHARED | {
    "load_args": Changes(False, argument("system"), None, TO_HF),
    "to_mcore": Changes(True, export_target, "llama-mcore", {"to_mcore": False}),
    "to_hf": Changes(True, export_target, "ckpt-hf", {"to_mcore": None, "mcore_model": "ckpt"}),
    "mcore_model": Refused("nowhere", "--mcore_model nowhere: no such folder", TO_HF),
    "output_dir": Changes("there", export_target, "there"),
    "exist_ok": Changes(True, export_target, "ckpt", {"output_dir": "ckpt"}),
    "test_convert_precision": ShownBy("tests/test_quickstart.py", "next token agrees at"),
    "mcore_adapters": ShownBy("tests/tuners/test_adapters.py", "mcore_adapters="),
    "adapters": ShownBy("tests/tuners/test_adapters.py", "adapters=folder"),
    "merge_lora": ShownBy("tests/tuners/test_adapters.py", 'merge_lora="false"'),
    "max_shard_size": Changes("5MB", export_shard, 5_000_000),
    "tensor_model_parallel_size": Refused(2, "1 process cannot be split"),
    "expert_model_parallel_size": Refused(2, "the model has no experts: drop it"),
    "expert_tensor_parallel_size": Refused(2, "the model has no experts: drop it"),
    "mtp_num_layers": Refused(1, "has no multi-token prediction"),
    "pipeline_model_parallel_size": Refused(2, "1 process cannot be split"),
    "extra_megatron_kwargs": ShownBy("tests/layouts/test_conversion.py", "extra_megatron_kwargs"),
    **{
        name: ShownBy("tests/args/test_parameters.py", "test_conversion_hands_on")
        for name in ("template", "system", "use_chat_template")
    },
}  # fmt: skip


def words(flags: dict[str, Any]) -> list[str]:
    """The command line; names in capitals are environment variables, None leaves a flag out."""
    line = []
    for name, value in flags.items():
        if value is None or name.isupper():
            continue
        if isinstance(value, bool | dict):
            value = json.dumps(value)
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


TRAIN = {"model": "llama", "dataset": ["rows.jsonl"], "train_iters": 20, "global_batch_size": 8}
EXPORT = {"model": "llama", "to_mcore": True}


def read_training(flags: dict[str, Any], cls: type[Any] = SftArguments) -> Context:
    return Context(*read_training_arguments(cls, words(TRAIN | flags), "megatron sft"))


def read_export(flags: dict[str, Any]) -> Context:
    line = words(EXPORT | flags)
    return Context(
        *read_command(ExportArguments, line, "swift export", "mcore_model", "mcore_adapters")
    )


def found(read: Callable[..., Context], flags: dict[str, Any], of: Callable[..., Any]) -> Any:
    try:
        return of(read(flags))
    except UserError as error:
        return f"ends in {error}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every command runs in."""
    work = tmp_path_factory.mktemp("parameters")
    save_model(work / "llama", "llama")
    save_model(work / "qwen", "qwen3")
    save_model(work / "moe", "qwen2_moe", **MOE_SIZES)
    lines = []
    for i in range(12):
        turns = [("user", f"question {i}"), ("assistant", "yes " * (i + 1)), ("user", "and?")]
        turns.append(("assistant", f"{i}."))
        lines.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    asked = [{"frage": f"q{i}", "antwort": f"a{i}"} for i in range(3)]
    for name, rows in {"rows": lines, "other": lines[:5], "mixed": [*lines[:2], *asked]}.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"frage": "query", "antwort": "response"}
    (work / "info.json").write_text(
        json.dumps([{"dataset_path": "mixed.jsonl", "columns": columns}])
    )
    (work / "plugin.py").write_text("import os\nos.environ['FROM_PLUGIN'] = '1'\n")
    import torch
    import torch.distributed.checkpoint as dcp

    dcp.save({"x": torch.ones(3)}, checkpoint_id=work / "ckpt" / "iter_0000001", no_dist=True)
    (work / "ckpt" / "iter_0000001" / "metadata.json").write_text("{}")
    (work / "ckpt" / "latest_checkpointed_iteration.txt").write_text("1")
    (work / "ckpt" / "args.json").write_text('{"system": "Be a pirate.", "data_seed": 7}')
    return work


@pytest.fixture(autouse=True)
def _in_inputs(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("SWIFTMEG_CACHE", str(inputs / "cache"))
    monkeypatch.setattr(registry, "_by_name", dict(registry._by_name))


def rows_of(table: dict[str, Row], kind: type[Any]) -> list[Any]:
    return [pytest.param(name, row, id=name) for name, row in table.items() if type(row) is kind]


@pytest.mark.parametrize(
    ("classes", "table"),
    [((SftArguments, PtArguments), TRAINING), ((ExportArguments,), CONVERSION | PLANNED)],
)
def test_every_flag_has_a_row(classes: tuple[type[Any], ...], table: dict[str, Row]) -> None:
    declared = {each.name for cls in classes for each in dataclasses.fields(cls)}
    assert declared - set(table) == set()
    unknown = set(table) - declared
    assert unknown == (set() if table is TRAINING else set(PLANNED) - declared)


def test_every_documented_parameter_is_declared() -> None:
    declared = {each.name for each in dataclasses.fields(RlhfArguments)}
    assert set(NAMES) - declared - set(aliases_of(declared)) == set()
    assert len(NAMES) == 176


def test_a_row_shows_another_value_than_the_default() -> None:
    for cls, table in ((SftArguments, TRAINING), (ExportArguments, CONVERSION)):
        for each in dataclasses.fields(cls):
            row = table.get(each.name, PLANNED.get(each.name))
            assert isinstance(row, ShownBy) or row.value != default_of(each), each.name


@pytest.mark.parametrize(("name", "row"), rows_of(TRAINING, Refused))
def test_training_refuses(name: str, row: Refused) -> None:
    def command() -> None:
        context = read_training(row.flags | {name: row.value})
        check_training(context.args, context.model)
        checkpoint_defaults(context.args, context.sources)
        choose_backend(context.args.transformer_impl)
        context.data()

    with pytest.raises(UserError, match=row.line) as caught:
        command()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "row"), rows_of(TRAINING, Says))
def test_training_says(name: str, row: Says) -> None:
    context = read_training(row.flags | {name: row.value})
    check_training(context.args, context.model)
    (line,) = notes(context.args, context.sources, context.model, "native")
    assert re.fullmatch(row.line, line)


@pytest.mark.parametrize(("name", "row"), rows_of(CONVERSION, Refused))
def test_conversion_refuses(name: str, row: Refused) -> None:
    def command() -> None:
        context = read_export(row.flags | {name: row.value})
        check_export(context.args, context.model)

    with pytest.raises(UserError, match=row.line):
        command()


@pytest.mark.parametrize("name", sorted(set(planned_flags(ExportArguments))))
def test_conversion_refuses_planned_flags(name: str) -> None:
    row = PLANNED[name]
    assert isinstance(row, Refused)
    with pytest.raises(UserError, match=row.line):
        read_export({name: row.value})


def test_values_that_mean_off_pass() -> None:
    flags = {each.name: default_of(each) for each in dataclasses.fields(SftArguments)}
    planned = {name: flags[name] for name in planned_flags(SftArguments)}
    read_training({name: value for name, value in planned.items() if value not in (None, [])})
    read_training({name: values[0] for name, values in OFF.items()})
    assert set(accepted_flags(SftArguments)) == set(ACCEPTED)


@pytest.mark.parametrize(
    ("read", "name", "row"),
    [
        pytest.param(read, name, row, id=f"{read.__name__}-{name}")
        for read, table in ((read_training, TRAINING), (read_export, CONVERSION))
        for name, row in table.items()
        if type(row) is Changes
    ],
)
def test_the_run_changes(read: Callable[..., Context], name: str, row: Changes) -> None:
    without = found(read, row.flags, row.of)
    value = found(read, row.flags | {name: row.value}, row.of)
    assert value != without
    assert not str(value).startswith("ends in")
    if row.becomes is not ...:
        assert value == row.becomes


@pytest.mark.parametrize(
    ("name", "row"),
    [*rows_of(TRAINING, ShownBy), *rows_of(CONVERSION, ShownBy)],
)
def test_the_shown_test_is_there(name: str, row: ShownBy) -> None:
    text = (ROOT / row.file).read_text()
    assert row.test in text


def namespaces(groups: list[dict[str, Any]], attributes: list[str]) -> list[dict[str, Any]]:
    """Megatron's namespace for each group of flags, as far as `attributes` go."""
    import os

    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    from swiftmeg import upstream
    from swiftmeg.trainers.training_data import TrainingData
    from swiftmeg.trainers.training_namespace import training_namespace

    upstream.apply()
    made = []
    for flags in groups:
        os.environ.update(
            {"WORLD_SIZE": "1", "WANDB_MODE": "disabled"}
            | {k: v for k, v in flags.items() if k.isupper()}
        )
        context = read_training(flags)
        args = context.args
        some: Any = list(range(12))
        data = TrainingData(
            train=some,
            validation=some if "eval_iters" in flags else None,
            collate=None,  # type: ignore[arg-type]
            longest=64,
            train_iters=20,
            args=args,
        )
        megatron = training_namespace(args, context.model, data)
        made.append({name: plain(getattr(megatron, name)) for name in attributes})
        destroy_global_vars()
        destroy_num_microbatches_calculator()
    return made


def plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | list | None) else str(value)


def grouped(table: dict[str, Sets]) -> list[dict[str, Any]]:
    """Flags of as many rows as do not contradict each other, group by group."""
    groups: list[dict[str, Any]] = []
    for name, row in table.items():
        flags = row.flags | {name: row.value}
        for group in groups:
            world = {each.get("WORLD_SIZE", "1") for each in (group, flags)}
            alone = {name, *group} & ALONE
            if (
                len(world) == 1
                and not alone
                and all(group.get(k, v) == v for k, v in flags.items())
            ):
                group.update(flags)
                break
        else:
            groups.append(flags)
    return groups


ALONE = {
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
    "use_distributed_optimizer",
    "optimizer",
    "cross_entropy_fusion_impl",
    "lr_warmup_fraction",
    "deterministic_mode",
    "optimizer_cpu_offload",
}
"""Flags that Megatron takes only without most others."""


def test_megatron_gets_every_value(inputs: Path) -> None:
    table = {name: row for name, row in TRAINING.items() if type(row) is Sets}
    groups = grouped(table)
    attributes = sorted({row.attribute for row in table.values()})
    without, *made = run_ranks(1, namespaces, [{}, *groups], attributes)[0]
    wrong = []
    for name, row in table.items():
        place = next(i for i, group in enumerate(groups) if group.get(name, ...) == row.value)
        value, before = made[place][row.attribute], without[row.attribute]
        expected = row.value if row.expected is ... else row.expected
        if value != expected or before == expected:
            wrong.append(f"{name}: {row.attribute} is {value}, without the flag {before}")
    assert wrong == []


def test_the_learning_rate_can_be_left_out() -> None:
    """no_log_learning_rate_to_tensorboard"""
    from swiftmeg.trainers.output import leave_out

    written = []
    writer = SimpleNamespace(add_scalar=lambda tag, *values: written.append(tag))
    leave_out(writer, "learning-rate")
    for tag in ("learning-rate", "lm loss", "learning-rate vs samples"):
        writer.add_scalar(tag, 1.0, 1)
    assert written == ["lm loss"]


def test_conversion_hands_on(tmp_path: Path) -> None:
    """template, system and use_chat_template reach `swift infer` through args.json."""
    from swiftmeg.args.resolve import read_args_file, write_args_file

    flags = {"template": "chatml", "system": "Be brief.", "use_chat_template": False}
    context = read_export(flags)
    write_args_file(tmp_path, context.args, context.sources)
    saved = read_args_file(tmp_path)
    assert {name: saved[name] for name in flags} == flags
