"""Flags that are Megatron's own: each non-None field becomes Megatron's `--name-with-dashes`.

True becomes the bare flag, False and None leave it out, lists become several values.
"""

from dataclasses import dataclass, field
from typing import Literal


class MegatronFlags:
    """Marks dataclasses whose fields are handed to Megatron's parser under their own names."""


@dataclass
class TrainingArguments(MegatronFlags):
    """Training"""

    micro_batch_size: int = 1
    """Samples per forward pass of one data-parallel rank."""
    global_batch_size: int = 16
    """Samples per optimizer step over all ranks."""
    train_iters: int | None = None
    """Optimizer steps. None: from --max_epochs."""
    recompute_granularity: Literal["selective", "full", "none"] = "selective"
    """What is computed again in the backward pass instead of being stored: some modules of every
    layer, whole layers, or nothing."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How layers are grouped for full recomputation."""
    recompute_num_layers: int | None = None
    """Layers per group (uniform) or per stage (block) for full recomputation."""
    recompute_modules: list[str] | None = None
    """Submodules for selective recomputation. None: core_attn where attention keeps its scores, in
    fp32 or with --attention_backend unfused or local; nothing where a fused kernel keeps none."""
    deterministic_mode: bool = False
    """Choose kernels that give the same bits in every run."""
    no_check_for_nan_in_loss_and_grad: bool = False
    """Go on after a loss or gradient norm that is not finite; weights that are not are never
    saved."""
    log_interval: int = 5
    """Steps between log lines; the first step is logged too."""
    tensorboard_dir: str | None = None
    """TensorBoard folder. None: `runs` in the output folder."""
    cross_entropy_loss_fusion: bool | None = None
    """Compute the cross entropy in blocks of tokens, without whole logits, which is also done
    without the flag. false: whole logits and Megatron's unfused loss."""
    cross_entropy_fusion_impl: Literal["native", "te"] = "native"
    """Which fused cross entropy."""
    calculate_per_token_loss: bool = True
    """Divide the summed loss once by the trained tokens of the global batch."""
    attention_backend: Literal["flash", "fused", "unfused", "local", "auto"] = "auto"
    """Attention kernels of TransformerEngine; local: those of native layers."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW."""
    optimizer_cpu_offload: bool = False
    """Keep optimizer state on the CPU; needs --use_precision_aware_optimizer."""
    optimizer_offload_fraction: float = 1.0
    """Share of the optimizer state that --optimizer_cpu_offload moves."""
    use_precision_aware_optimizer: bool = False
    """TransformerEngine's fused Adam, whose states may be of lower precision; needs a GPU."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the main gradients; needs --use_precision_aware_optimizer unless fp32."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Dtype of the master weights; needs --use_precision_aware_optimizer unless fp32."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Dtype of Adam's first moment; needs --use_precision_aware_optimizer unless fp32."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Dtype of Adam's second moment; needs --use_precision_aware_optimizer unless fp32."""
    manual_gc: bool = False
    """Collect garbage at set steps only."""
    manual_gc_interval: int = 0
    """Steps between garbage collections with --manual_gc."""
    seed: int = 42
    """Seed of Python, NumPy and torch, and of the order of the data."""
    num_workers: int = 4
    """Processes that load batches; 0 loads them in the training process."""
    seq_length: int | None = None
    """Megatron's sequence length. None: --max_length."""
    use_cpu_initialization: bool = False
    """Create weights on the CPU."""
    no_masked_softmax_fusion: bool = False
    """Switch off the fused scale, mask and softmax."""
    no_bias_dropout_fusion: bool = False
    """Switch off the fused bias, dropout and residual."""
    no_bias_swiglu_fusion: bool = False
    """Switch off the fused SwiGLU."""
    no_rope_fusion: bool | None = None
    """Switch off TransformerEngine's fused RoPE, which is used where layers and scaling allow it,
    also with false."""
    no_gradient_accumulation_fusion: bool | None = None
    """Switch off weight-gradient accumulation inside the products, which is on where there is a
    GPU, also with false. apex is not needed."""
    exit_interval: int | None = None
    """Save and end when the step is a multiple of this."""
    exit_duration_in_mins: int | None = None
    """Save and end after this many minutes."""
    exit_signal_handler: bool = False
    """On SIGTERM finish the step, save and end; after ten minutes ranks are killed."""


@dataclass
class LearningRateArguments(MegatronFlags):
    """Learning rate and regularisation"""

    lr: float | None = None
    """Peak learning rate. None: that of the run that is continued, else 1e-5, with --train_type
    lora 1e-4."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root"] = "cosine"
    """Decay after warm-up."""
    lr_decay_iters: int | None = None
    """Steps of decay. None: --train_iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of --lr_decay_iters, instead of --lr_warmup_iters."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay; where it is not given, that of the run that is
    continued."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Largest global gradient norm."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    attention_dropout: float | None = None
    """Dropout of attention probabilities. None: as in config.json."""
    hidden_dropout: float = 0.0
    """Dropout of the residual branches."""


@dataclass
class CheckpointArguments(MegatronFlags):
    """Checkpoints"""

    save: str | None = None
    """Output root. None: megatron_output/{model name}."""
    save_interval: int = 500
    """Steps between checkpoints; the last step is always saved."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""
    load: str | None = None
    """Megatron checkpoint to start from: the folder that holds iter_*."""
    ckpt_step: int | None = None
    """Iteration of --load to start from. None: the latest."""
    finetune: bool = False
    """Load the weights only and start at step 0; false continues where the checkpoint stopped."""
    no_save_optim: bool = False
    """Leave the optimizer state out of checkpoints."""
    no_save_rng: bool = False
    """Leave the random state out of checkpoints."""
    no_load_optim: bool = False
    """Do not load the optimizer state."""
    no_load_rng: bool = False
    """Do not load the random state."""
    ckpt_format: Literal["torch_dist", "torch", "zarr"] = "torch_dist"
    """Checkpoint format: torch_dist, which loads in any layout."""
    auto_detect_ckpt_format: bool = True
    """Find the format of the checkpoint that --load names."""
    exit_on_missing_checkpoint: bool = True
    """End if --load holds no checkpoint; false starts from --model then."""
    no_initialization: bool = False
    """Do not fill weights with random numbers before they are loaded, which saves seconds. The
    original's default is true; here every weight is loaded, or the run ends, with either."""


@dataclass
class ParallelArguments(MegatronFlags):
    """Distributed"""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Process-group backend. None: nccl with GPUs, gloo without."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    tensor_model_parallel_size: int = 1
    """Ranks that share every layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks that hold consecutive layers."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first pipeline stage."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last pipeline stage."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when layers are split over stages."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and the loss as a layer when layers are split over stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model parts per pipeline stage, which shorten its idle time. None: 1."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per model part, instead of the number of parts."""
    pipeline_model_parallel_layout: str | None = None
    """The layers of every stage, e.g. "Et*3|(tt|)*6L": E embedding, t layer, L loss."""
    context_parallel_size: int = 1
    """Ranks that share every sample, each holding two of 2 * size chunks of it."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel ranks."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with products; needs TransformerEngine, a GPU and
    --sequence_parallel."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather parameters during the forward pass."""
    distributed_timeout_minutes: int = 60
    """How long a collective may wait before the job ends; --ddp_timeout counts instead."""


@dataclass
class LoggingArguments(MegatronFlags):
    """Logging"""

    log_params_norm: bool = False
    """Log the norm of the parameters."""
    log_throughput: bool = False
    """Log TFLOP/s per GPU."""
    logging_level: str | None = None
    """Level of Python's loggers: a name such as INFO, or a number."""
    tensorboard_log_interval: int = 1
    """Steps between TensorBoard points."""
    tensorboard_queue_size: int = 50
    """Pending TensorBoard points before a write."""
    log_timers_to_tensorboard: bool = True
    """Write timers to TensorBoard."""
    log_validation_ppl_to_tensorboard: bool = True
    """Write the validation perplexity to TensorBoard."""
    log_memory_to_tensorboard: bool = True
    """Write memory use to TensorBoard."""
    wandb_project: str = ""
    """Weights & Biases project; empty switches it off."""
    wandb_exp_name: str = ""
    """Name of the Weights & Biases run."""
    wandb_save_dir: str = ""
    """Folder of the Weights & Biases files."""


@dataclass
class EvaluationArguments(MegatronFlags):
    """Evaluation"""

    eval_iters: int = -1
    """Batches per evaluation. -1: as many as the validation set fills; 0 without one."""
    eval_interval: int | None = None
    """Steps between evaluations. None: --save_interval."""


@dataclass
class PrecisionArguments(MegatronFlags):
    """Mixed precision"""

    fp16: bool | None = None
    """Train in fp16. None: if --torch_dtype is float16."""
    bf16: bool | None = None
    """Train in bf16. None: if --torch_dtype is bfloat16."""
    attention_softmax_in_fp32: bool = True
    """Attention probabilities in fp32."""


@dataclass
class Fp8Arguments(MegatronFlags):
    """FP8"""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute the linear layers in FP8; needs TransformerEngine and a GPU that has FP8. hybrid:
    e4m3 forward, e5m2 backward."""
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "delayed"
    """How FP8 scales are found."""
    fp8_amax_history_len: int = 1024
    """Steps that delayed scaling looks back."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "max"
    """How delayed scaling condenses its history."""
    fp8_param_gather: bool = False
    """Keep and gather parameters in FP8; needs --fp8_format and --use_distributed_optimizer."""


@dataclass
class MegatronArguments(
    TrainingArguments,
    LearningRateArguments,
    CheckpointArguments,
    ParallelArguments,
    LoggingArguments,
    EvaluationArguments,
    PrecisionArguments,
    Fp8Arguments,
):
    """Every flag that Megatron itself reads."""


@dataclass
class LoopArguments:
    """Run"""

    transformer_impl: Literal["transformer_engine", "native", "local"] | None = None
    """Layer backend. None: transformer_engine where it is installed with a GPU, else native."""
    dry_run: bool = False
    """Check everything and print the plan, i.e. parameters and memory of every rank and the batch
    arithmetic, instead of training; in one process, without a GPU, for NPROC_PER_NODE x NNODES
    processes."""
    ddp_timeout: int | None = None
    """Seconds that a collective may wait before the job ends. None: those of
    --distributed_timeout_minutes."""
    max_epochs: int | None = None
    """Stop after this many passes over the data, or --train_iters if that is fewer steps."""
    no_log_learning_rate_to_tensorboard: bool = False
    """Leave the learning rate out of TensorBoard."""
    add_version: bool = True
    """Write to a new `vN-time` folder inside --save."""
    save_total_limit: int | None = None
    """Checkpoints to keep; older ones are deleted when a new one is complete. None: all."""
    save_safetensors: bool = False
    """Write a Hugging Face folder, `iter_N-hf`, beside every checkpoint."""
    extra_megatron_kwargs: dict[str, object] = field(default_factory=dict)
    """Other arguments of Megatron by name, as JSON."""
