"""Combinations of flags that cannot work, each with the one line that the command ends in."""

import json
from pathlib import Path

import pytest

from tests.cli.commands import Case, check_message, ranks, run_forked, run_together, sft, snapshot
from tests.tiny import save_model


def case(expected: str, processes: int = 1, late: bool = False, **flags: object) -> Case:
    """A `megatron sft` with `flags`, as rank 0 of `processes`."""
    environ = ranks(processes) if processes > 1 else {}
    name = "-".join([f"{processes}x", *(f"{k}={v}" for k, v in flags.items())])
    return Case(name, sft(**flags), expected, environ, late)


TRUE, FALSE = "true", "false"
FULL = {"recompute_granularity": "full"}
PRECISE = {"use_precision_aware_optimizer": TRUE}
FP8 = {"fp8_format": "hybrid"}

CASES = [
    # Recomputation.
    case("full needs --recompute_method uniform or block and --recompute_num_layers a n", **FULL),
    case("full needs --recompute_num_layers a number", **FULL, recompute_method="uniform"),
    case("block needs --recompute_granularity full: set it or drop --recompute_method",
         recompute_method="block"),
    case("--recompute_num_layers 1 needs --recompute_granularity full", recompute_num_layers=1),
    case("--recompute_num_layers 0: must be at least 1", **FULL, recompute_method="uniform",
         recompute_num_layers=0),
    case("--recompute_modules mlp needs --recompute_granularity selective", **FULL,
         recompute_method="uniform", recompute_num_layers=1, recompute_modules="mlp"),
    case("--recompute_method uniform needs --recompute_granularity full",
         recompute_granularity="none", recompute_method="uniform"),
    case("--recompute_modules attention: there is no such module; choose from core_attn",
         recompute_modules="attention"),
    case("--recompute_modules mla_up_proj: --model .* has none", recompute_modules="mla_up_proj"),
    case("--recompute_modules moe_act: --model .* has none", recompute_modules="moe_act"),
    # Adapters.
    case("--lorap_lr_ratio 16.0 needs --train_type lora: set it or drop it", lorap_lr_ratio=16),
    case("--lorap_lr_ratio 0.0: must be above 0", train_type="lora", lorap_lr_ratio=0),
    # The layout.
    case("1 process cannot be split into --tensor_model_parallel_size 2 x",
         tensor_model_parallel_size=2),
    case("3 processes cannot be split", 3, tensor_model_parallel_size=2),
    case("--tensor_model_parallel_size 3 does not divide .*num_attention_heads=4", 3,
         tensor_model_parallel_size=3),
    case("--tensor_model_parallel_size 0: must be at least 1", tensor_model_parallel_size=0),
    case("--pipeline_model_parallel_size 0: must be at least 1", pipeline_model_parallel_size=0),
    case("4 layers cannot be split over --pipeline_model_parallel_size 3", 3,
         pipeline_model_parallel_size=3),
    case("4 layers cannot be split over --pipeline_model_parallel_size 2", 2,
         pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=4),
    case("4 layers cannot be split over --pipeline_model_parallel_size 2", 2,
         pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1,
         decoder_last_pipeline_num_layers=2),
    case("4 layers cannot be split over --pipeline_model_parallel_size 3", 3,
         pipeline_model_parallel_size=3, decoder_last_pipeline_num_layers=1),
    case("needs? --pipeline_model_parallel_size above 1", decoder_first_pipeline_num_layers=2),
    case("--decoder_last_pipeline_num_layers 0: must be at least 1", 2,
         pipeline_model_parallel_size=2, decoder_last_pipeline_num_layers=0),
    case("--global_batch_size 3 must be a multiple of --micro_batch_size 2 x 1",
         global_batch_size=3, micro_batch_size=2),
    case("--global_batch_size 4 must be a multiple of --micro_batch_size 1 x 3 data", 3),
    case("--micro_batch_size 0: must be at least 1", micro_batch_size=0),
    case("--distributed_backend nccl: ranks talk through .* gloo without GPUs",
         distributed_backend="nccl"),
    # Overlap.
    case("--tp_comm_overlap true needs --sequence_parallel true: set it or drop --tp_comm_overlap",
         2, tensor_model_parallel_size=2, tp_comm_overlap=TRUE),
    case("--tp_comm_overlap true needs TransformerEngine", 2, tensor_model_parallel_size=2,
         sequence_parallel=TRUE, tp_comm_overlap=TRUE),
    case("--overlap_param_gather true needs --overlap_grad_reduce true: set it or drop",
         overlap_param_gather=TRUE),
    case("--overlap_param_gather true needs --use_distributed_optimizer true",
         overlap_param_gather=TRUE, overlap_grad_reduce=TRUE, use_distributed_optimizer=FALSE),
    # The optimizer.
    case("--optimizer sgd needs --use_distributed_optimizer false", optimizer="sgd"),
    case("optimizer true needs --use_distributed_optimizer true", **PRECISE,
         use_distributed_optimizer=FALSE),
    case("--use_precision_aware_optimizer true needs TransformerEngine", **PRECISE),
    case("--optimizer_cpu_offload true needs --use_precision_aware_optimizer true",
         optimizer_cpu_offload=TRUE),
    case("--optimizer_offload_fraction 0.5 needs --optimizer_cpu_offload true",
         optimizer_offload_fraction=0.5),
    case("--optimizer_offload_fraction 1.5: must be from 0 to 1", optimizer_offload_fraction=1.5),
    *(case(f"--{name} {value} needs --use_precision_aware_optimizer true", **{name: value})
      for name, value in (("main_grads_dtype", "bf16"), ("main_params_dtype", "fp16"),
                          ("exp_avg_dtype", "fp8"), ("exp_avg_sq_dtype", "bf16"))),
    # Learning rate and regularisation.
    case("--lr_warmup_fraction 0.1 and --lr_warmup_iters 1 exclude each other",
         lr_warmup_fraction=0.1, lr_warmup_iters=1),
    case("--lr_warmup_iters 2 must be below --train_iters 2", lr_warmup_iters=2),
    case("--lr_warmup_iters 9 must be below --lr_decay_iters 5", lr_warmup_iters=9,
         lr_decay_iters=5),
    case("--lr_warmup_fraction 1.5: must be from 0 to 1", lr_warmup_fraction=1.5),
    case("--min_lr 1.0 is above --lr 1e-05", min_lr=1),
    case("--lr -1.0: must be at least 0", lr=-1),
    case("--adam_beta2 1.0: must be from 0 to 1, 1 excluded", adam_beta2=1),
    case("--hidden_dropout 1.0: must be from 0 to 1, 1 excluded", hidden_dropout=1),
    case("--clip_grad -1.0: must be at least 0", clip_grad=-1),
    case("--train_iters 0: must be at least 1", train_iters=0),
    case("--max_epochs 0: must be at least 1", max_epochs=0),
    case("--save_interval 0: must be at least 1", save_interval=0),
    case("--log_interval 0: must be at least 1", log_interval=0),
    case("--eval_iters -2: must be at least -1", eval_iters=-2),
    case("--num_workers -1: must be at least 0", num_workers=-1),
    case("--split_dataset_ratio 1.0: must be from 0 to 1, 1 excluded", split_dataset_ratio=1),
    # Kernels and precision.
    case("--fp16 true contradicts --torch_dtype float32", fp16=TRUE, torch_dtype="float32"),
    case("fp16 true and --bf16 true exclude each other", fp16=TRUE, bf16=TRUE),
    case("fp16 training needs a GPU", fp16=TRUE),
    case("--fp8_format hybrid .* needs sizes that are multiples of 16.*intermediate_size", **FP8),
    case("--fp8_format hybrid needs TransformerEngine", **FP8, model="even"),
    case("--fp16 true and --fp8_format hybrid exclude each other", **FP8, fp16=TRUE),
    case("--fp8_recipe tensorwise needs --fp8_format hybrid or e4m3", fp8_recipe="tensorwise"),
    case("--fp8_amax_history_len 16 needs --fp8_format", fp8_amax_history_len=16),
    case("--fp8_param_gather true needs --fp8_format hybrid or e4m3", fp8_param_gather=TRUE),
    case("fp8_param_gather true needs --use_distributed_optimizer true", **FP8,
         fp8_param_gather=TRUE, use_distributed_optimizer=FALSE),
    case("--recompute_modules layernorm and --fp8_recipe delayed exclude each other", **FP8,
         model="even", recompute_modules="layernorm"),
    case("--cross_entropy_fusion_impl te: Megatron has switched it off",
         cross_entropy_loss_fusion=TRUE, cross_entropy_fusion_impl="te"),
    case("--deterministic_mode true and --cross_entropy_loss_fusion true exclude each other",
         deterministic_mode=TRUE, cross_entropy_loss_fusion=TRUE),
    case("--attention_backend local .* set --transformer_impl native", attention_backend="local",
         transformer_impl="transformer_engine"),
    case("--transformer_impl transformer_engine needs a GPU", late=True,
         transformer_impl="transformer_engine"),
    # The rest.
    case("--manual_gc_interval 5 needs --manual_gc true", manual_gc_interval=5),
    case("--dataloader_type external needs --streaming true", dataloader_type="external"),
    case("--rope_scaling yarn: yarn needs factor: set --max_model_len", rope_scaling="yarn"),
    case("--max_model_len 4096 needs --rope_scaling", max_model_len=4096),
    case("Megatron has no argument num_layer: did you mean", late=True,
         extra_megatron_kwargs='{"num_layer": 2}'),
    case("num-experts", late=True, extra_megatron_kwargs='{"num_experts": "x"}'),
    case("Megatron refuses", late=True, extra_megatron_kwargs='{"context_parallel_size": 2}'),
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of which has sizes that FP8 takes, and rows."""
    work = tmp_path_factory.mktemp("inputs")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    save_model(work / "llama", "llama", **sizes)
    save_model(work / "even", "llama", **sizes | {"head_dim": 16, "intermediate_size": 96})
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (work / "rows.jsonl").write_text(8 * (json.dumps({"messages": turns}) + "\n"))
    return work


EARLY = [case for case in CASES if not case.late]


@pytest.fixture(scope="module")
def ended(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """How the commands ended that do not get as far as starting Megatron."""
    before = snapshot(inputs)
    results = run_together(EARLY, inputs, tmp_path_factory.mktemp("early"))
    assert snapshot(inputs) == before
    return {case.name: result for case, result in zip(EARLY, results, strict=True)}


@pytest.mark.parametrize("case", EARLY, ids=lambda case: case.name)
def test_one_clear_line(case: Case, ended: dict[str, tuple[int, str]]) -> None:
    code, text = ended[case.name]
    assert code == 1, text
    check_message(text, case.expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.late], ids=lambda case: case.name)
def test_one_clear_line_of_megatron(case: Case, inputs: Path, tmp_path: Path) -> None:
    before = snapshot(inputs)
    code, text = run_forked(case, inputs, tmp_path)
    assert code == 1, text
    check_message(text, case.expected)
    assert snapshot(inputs) == before
