"""The memory estimate: its arithmetic, and what was measured on an H100."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftmeg.planning.memory import WORKSPACE, stage_memory
from swiftmeg.planning.stages import Chunk, Stage, Weight

LAYER = 1000


def namespace(**changes: Any) -> Any:
    """Megatron's namespace of a dense model in bf16, as far as the estimate reads it."""
    values = {
        "world_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": False,
        "bf16": True,
        "fp16": False,
        "accumulate_allreduce_grads_in_fp32": True,
        "optimizer": "adam",
        "use_distributed_optimizer": True,
        "use_precision_aware_optimizer": False,
        "optimizer_cpu_offload": False,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": None,
        "multi_latent_attention": False,
        "attention_dropout": 0.0,
        "softmax_type": "vanilla",
        "window_size": None,
        "context_parallel_size": 1,
        "padded_batches": False,
        "micro_batch_size": 1,
        "seq_length": 500,
        "qk_layernorm": False,
        "layer_backend": "transformer_engine",
        "num_experts": None,
        "hidden_size": 64,
        "ffn_hidden_size": 256,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 8,
        "padded_vocab_size": 1024,
        "cross_entropy_loss_fusion": False,
        "mtp_num_layers": None,
    }
    return SimpleNamespace(**values | changes)


def stage(number: int = 0, layers: int = 4, last: bool = True, trained: bool = True) -> Stage:
    weights = tuple(Weight(f"w{i}", LAYER, 1, False, trained) for i in range(layers))
    return Stage(
        number,
        (Chunk(tuple(range(layers)), (False,) * layers, 0, number == 0, last, weights),),
    )


def test_states_take_what_mixed_precision_takes() -> None:
    memory = stage_memory(namespace(), stage(), 0, 1)
    assert (memory.weights, memory.gradients, memory.optimizer) == (8e3, 16e3, 48e3)


@pytest.mark.parametrize(
    ("changes", "trained", "expected"),
    [
        ({"world_size": 8}, True, (8e3, 16e3, 6e3)),
        ({"world_size": 8, "tensor_model_parallel_size": 2}, True, (8e3, 16e3, 12e3)),
        ({"world_size": 8, "use_distributed_optimizer": False}, True, (8e3, 16e3, 48e3)),
        ({"bf16": False}, True, (16e3, 16e3, 32e3)),
        ({"optimizer": "sgd", "sgd_momentum": 0.9}, True, (8e3, 16e3, 32e3)),
        ({"accumulate_allreduce_grads_in_fp32": False}, True, (8e3, 8e3, 48e3)),
        (
            {
                "use_precision_aware_optimizer": True,
                "main_params_dtype": torch.float32,
                "exp_avg_dtype": torch.bfloat16,
                "exp_avg_sq_dtype": torch.uint8,
            },
            True,
            (8e3, 16e3, 28e3),
        ),
        ({}, False, (8e3, 0, 0)),
    ],
)
def test_states_follow_the_flags(changes: Any, trained: bool, expected: Any) -> None:
    memory = stage_memory(namespace(**changes), stage(trained=trained), 0, 1)
    assert (memory.weights, memory.gradients, memory.optimizer) == expected


def activations(args: Any, accumulation: int = 1, **place: Any) -> float:
    return stage_memory(args, stage(**place), 1000, accumulation).activations


def test_activations_are_what_the_backward_pass_needs() -> None:
    # Per token and layer in bf16: four times the stream (64), q, k, v and the attention's output
    # (64 + 16 + 16 + 64), both halves of the MLP's first product and their activation (3 x 256),
    # and an fp32 number per head; then the last norm's input and output.
    layer = 2 * (4 * 64 + 160 + 3 * 256) + 4 * 8
    assert activations(namespace()) == 1000 * (4 * layer + 2 * 2 * 64)


def test_recomputation_keeps_less() -> None:
    uniform = {"recompute_granularity": "full", "recompute_method": "uniform"}
    none = activations(namespace())
    core = activations(namespace(recompute_granularity="selective"))
    mlp = activations(namespace(recompute_granularity="selective", recompute_modules=["mlp"]))
    full = [activations(namespace(**uniform, recompute_num_layers=n)) for n in (1, 2)]
    assert core > none  # fused attention keeps nothing to recompute, but then the whole projection
    assert none > mlp > full[0] > full[1]


def test_sinks_and_windows_keep_masks() -> None:
    plain = activations(namespace())
    # Per token and layer: a mask over 500 keys, as booleans and in bf16, beside queries, keys and
    # values of 8 heads, with 8 more columns in queries and keys.
    sinks = 500 * 3 + 2 * 8 * (3 * 8 + 16)
    assert activations(namespace(softmax_type="learnable")) == plain + 1000 * 4 * sinks
    window = {"window_size": (8, 0), "context_parallel_size": 2}
    assert activations(namespace(**window)) == plain  # packed: a kernel that knows windows
    padded = window | {"padded_batches": True, "micro_batch_size": 2}
    assert activations(namespace(**padded)) == plain + 1000 * 4 * 500 * 3 / 2
    core = namespace(**padded, recompute_granularity="selective")
    assert activations(core) < activations(namespace(**padded))


def test_earlier_stages_hold_more_micro_batches() -> None:
    args = namespace(world_size=4, pipeline_model_parallel_size=4)
    held = [activations(args, 8, number=number, last=False) for number in range(4)]
    assert held == sorted(held, reverse=True)
    layers = [activations(args, count, number=0, last=False) for count in (1, 2, 4, 8)]
    assert layers[0] < layers[1] < layers[2] == layers[3]


def test_tensor_parallel_ranks_share_activations() -> None:
    alone = activations(namespace())
    shared = {"world_size": 2, "tensor_model_parallel_size": 2}
    two = activations(namespace(**shared))
    assert alone > two > alone / 2
    assert activations(namespace(**shared, sequence_parallel=True)) == alone / 2


def test_the_loss_keeps_half_precision_logits_and_an_fp32_softmax() -> None:
    assert stage_memory(namespace(), stage(), 1000, 1).loss == 1000 * 1024 * 6
    assert stage_memory(namespace(bf16=False), stage(), 1000, 1).loss == 1000 * 1024 * 4
    assert stage_memory(namespace(), stage(last=False), 1000, 1).loss == 0


QWEN_1_5B = {
    "hidden_size": 1536,
    "ffn_hidden_size": 8960,
    "num_attention_heads": 12,
    "num_query_groups": 2,
    "kv_channels": 128,
    "padded_vocab_size": 151936,
}
UNIFORM = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}

MEASURED = [
    ({}, 48.65, 54.07),
    ({"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, 49.41, 54.75),
    (UNIFORM, 33.66, 39.33),
]
"""Flags, and GiB allocated and reserved at the peak of full fine-tuning with micro-batches of 2 x
4096 tokens on one H100; see docs/benchmarks.md."""


@pytest.mark.parametrize(("flags", "allocated", "reserved"), MEASURED)
def test_the_estimate_is_near_what_an_h100_measured(
    flags: dict[str, Any],
    allocated: float,
    reserved: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    weights = (Weight("all", 1_543_714_304, 1, False, True),)
    whole = Stage(0, (Chunk(tuple(range(28)), (False,) * 28, 0, True, True, weights),))
    memory = stage_memory(namespace(**QWEN_1_5B, **flags), whole, 2 * 4096, 4)
    used = memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.loss
    assert (used + WORKSPACE) / 2**30 == pytest.approx(allocated, rel=0.005)
    assert memory.peak / 2**30 == pytest.approx(reserved, rel=0.02)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert stage_memory(namespace(**QWEN_1_5B, **flags), whole, 2 * 4096, 4).stale == 0
