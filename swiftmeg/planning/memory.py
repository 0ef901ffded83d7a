"""Memory of a rank in training: what Megatron and TransformerEngine allocate, in bytes."""

import argparse
import os
from dataclasses import dataclass

import torch

from swiftmeg.planning.activations import element_size, layer_bytes, stream_bytes
from swiftmeg.planning.stages import Chunk, Stage, Weight

WORKSPACE = 2**27
"""Bytes that cuBLAS and TransformerEngine keep to work in."""

ROUNDING = 1.02
"""What torch's allocator holds for one byte in use, beside what `Memory.stale` says. Measured, see
docs/benchmarks.md."""

_STATE_BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.uint8: 1}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a stage at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    """Logits, their softmax and gradient."""

    stale: float
    """Freed blocks that the allocator holds in vain: micro-batches differ in length, so one softmax
    of another length than the last waits for its like. None with expandable segments."""

    @property
    def peak(self) -> float:
        """All of it, as torch reserves it; what nvidia-smi shows has CUDA's own on top."""
        used = self.weights + self.gradients + self.optimizer + self.activations + self.loss
        return ROUNDING * (used + WORKSPACE) + self.stale


def stage_memory(args: argparse.Namespace, stage: Stage, tokens: int, accumulation: int) -> Memory:
    """Memory of a rank of `stage`.

    `tokens`: of one micro-batch on one context-parallel rank. `accumulation`: micro-batches a step.
    """
    trained = [weight for weight in stage.weights if weight.trained]
    last = stage.chunks[-1].last
    loss = tokens * _loss_bytes(args) if last else 0.0
    kept, working = _activations(args, stage, accumulation)
    # The loss is computed and gone before the first layer's backward pass needs its own room.
    extra = max(loss, tokens * working + _largest_gradient(args, trained))
    return Memory(
        weights=_weight_bytes(args)
        * sum(weight.size for weight in stage.weights)
        * (1 + getattr(args, "frozen_copies", 0)),
        gradients=_gradient_bytes(args) * sum(weight.size for weight in trained),
        optimizer=_optimizer_bytes(args, trained),
        activations=tokens * kept + extra - loss,
        loss=loss,
        stale=tokens * 4 * _vocabulary(args) if last and not expandable_segments() else 0.0,
    )


def expandable_segments() -> bool:
    """Whether the environment gives torch's allocator segments that grow, which leave no gaps."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return any("expandable_segments:True" in os.environ.get(name, "") for name in names)


def _weight_bytes(args: argparse.Namespace) -> float:
    return float(element_size(args))


def _gradient_bytes(args: argparse.Namespace) -> float:
    """Gradients add up in fp32 unless the optimizer is told otherwise."""
    return 4.0 if args.accumulate_allreduce_grads_in_fp32 else float(element_size(args))


def _optimizer_bytes(args: argparse.Namespace, trained: list[Weight]) -> float:
    """Master weights and moments; sharded over the ranks that hold the same weights."""
    moments = 4.0 * (args.sgd_momentum > 0) if args.optimizer == "sgd" else 8.0
    master = 4.0 if element_size(args) == 2 else 0.0
    if args.use_precision_aware_optimizer:
        moments = _STATE_BYTES[args.exp_avg_dtype] + _STATE_BYTES[args.exp_avg_sq_dtype]
        # fp16 main parameters are stored as what bf16 lacks.
        master = float(_STATE_BYTES[args.main_params_dtype])
    if args.optimizer_cpu_offload:
        master, moments = (
            (1 - args.optimizer_offload_fraction) * part for part in (master, moments)
        )
    total = 0.0
    for weight in trained:
        share = _shards(args, weight.expert) if args.use_distributed_optimizer else 1
        total += (master + moments) * weight.size / share
    return total


def _shards(args: argparse.Namespace, expert: bool) -> int:
    """Ranks with the same weights: data- and context-parallel ones, for experts fewer."""
    world, pp = args.world_size, args.pipeline_model_parallel_size
    if not expert:
        return int(world // (args.tensor_model_parallel_size * pp))
    etp = args.expert_tensor_parallel_size or 1
    return int(world // (etp * args.expert_model_parallel_size * pp))


def _largest_gradient(args: argparse.Namespace, trained: list[Weight]) -> float:
    """The gradient of one weight, before it is added to the others of its kind."""
    return element_size(args) * max((weight.size for weight in trained), default=0)


def _vocabulary(args: argparse.Namespace) -> float:
    return float(args.padded_vocab_size / args.tensor_model_parallel_size)


def _loss_bytes(args: argparse.Namespace) -> float:
    """Bytes per token: half-precision logits beside their fp32 softmax, which fp32 logits become
    in place; further predictions (MTP) keep theirs until the backward pass."""
    size = element_size(args)
    one = 4 + (size if size == 2 else 0)
    if args.cross_entropy_loss_fusion:
        one += 4  # the fused function keeps its steps apart
    return _vocabulary(args) * (one + 4 * (args.mtp_num_layers or 0))


def _activations(args: argparse.Namespace, stage: Stage, accumulation: int) -> tuple[float, float]:
    """Bytes per token kept by all micro-batches in flight, and those of one layer's backward."""
    kept = sum(
        _in_flight(args, stage, index, accumulation) * _chunk_bytes(args, chunk)
        for index, chunk in enumerate(stage.chunks)
    )
    layers = [
        layer_bytes(args, experts) for experts in {e for c in stage.chunks for e in c.experts}
    ]
    if not layers:
        return kept, 0.0
    if args.recompute_granularity == "full":
        group = args.recompute_num_layers if args.recompute_method == "uniform" else 1
        return kept, group * max(layer.kept for layer in layers)
    return kept, max(layer.again + layer.kept / 2 for layer in layers)


def _chunk_bytes(args: argparse.Namespace, chunk: Chunk) -> float:
    sizes = [layer_bytes(args, experts).kept for experts in chunk.experts]
    sizes += [layer_bytes(args, args.num_experts is not None).kept] * chunk.predicting
    ends = 2 * stream_bytes(args) if chunk.last else 0.0
    if args.recompute_granularity != "full":
        return sum(sizes) + ends
    if args.recompute_method == "uniform":
        groups = -(-len(sizes) // args.recompute_num_layers)
        return groups * stream_bytes(args) + ends
    count = min(args.recompute_num_layers, len(sizes))
    return count * stream_bytes(args) + sum(sizes[count:]) + ends


def _in_flight(args: argparse.Namespace, stage: Stage, chunk: int, accumulation: int) -> int:
    """Micro-batches whose activations of a chunk wait for their backward pass (1F1B)."""
    pp = args.pipeline_model_parallel_size
    behind = pp - stage.number
    if len(stage.chunks) == 1:
        return min(behind, accumulation)
    # Interleaved: 2 (pp - stage - 1) + (chunks - 1) pp + 1 chunk passes are under way at most.
    under_way = 2 * (behind - 1) + (len(stage.chunks) - 1) * pp + 1
    rounds, rest = divmod(under_way, pp)
    waves, position = divmod(rounds, len(stage.chunks))
    count = waves * pp + (pp if chunk < position else rest if chunk == position else 0)
    return min(count, accumulation)
