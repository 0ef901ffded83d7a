"""The plan as text: layout, batch arithmetic, parameters and memory of every rank."""

import argparse
from collections.abc import Iterator
from typing import Any

from swiftmeg.models.family import EMBEDDING, OUTPUT
from swiftmeg.models.hf import HFModel
from swiftmeg.planning.memory import Memory, stage_memory
from swiftmeg.planning.stages import Stage

GIB = 2**30
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "loss", "stale", "peak")


def report(
    args: Any, megatron: argparse.Namespace, model: HFModel, stages: list[Stage], sizes: Any
) -> Iterator[str]:
    """The lines of the plan."""
    yield "dry run: nothing is trained and nothing is written"
    yield f"model   {model.family.architecture}: {count_parameters(megatron, stages):,} parameters"
    yield f"layout  {_layout(megatron)}"
    yield f"batch   {_batch(args, megatron, sizes.sides)}"
    yield f"tokens  {_tokens(args, megatron, sizes)}"
    yield f"steps   {_steps(args, sizes)}"
    tokens = tokens_per_rank(args, megatron, sizes.sides)
    rows = [
        (stage, stage_memory(megatron, stage, tokens, accumulation(args, megatron)))
        for stage in stages
    ]
    yield ""
    yield from _table(rows)
    yield ""
    worst = max(rows, key=lambda row: row[1].peak)
    yield (
        f"peak    {worst[1].peak / GIB:.1f} GiB on each rank of stage {worst[0].number}, as torch "
        "reserves it; CUDA and NCCL take 1 to 2 GiB more"
    )


def accumulation(args: Any, megatron: argparse.Namespace) -> int:
    """Micro-batches of one rank in a step."""
    return int(args.global_batch_size // (args.micro_batch_size * megatron.data_parallel_size))


def tokens_per_rank(args: Any, megatron: argparse.Namespace, sides: int = 1) -> int:
    """Tokens of the largest micro-batch that one context-parallel rank computes.

    In padded batches each of an item's `sides` has the longest sample's length.
    """
    tokens = args.micro_batch_size * megatron.seq_length
    if not (args.padding_free or args.packing):
        tokens *= sides
    return int(-(-tokens // megatron.context_parallel_size))


def count_parameters(megatron: argparse.Namespace, stages: list[Stage]) -> int:
    """Parameters of the model: tied weights once, and no rows that pad the vocabulary."""
    untied = megatron.untie_embeddings_and_output_weights
    padding = (megatron.padded_vocab_size - megatron.vocab_size) * megatron.hidden_size
    total = 0
    for chunk in (chunk for stage in stages for chunk in stage.chunks):
        for weight in chunk.weights:
            name = weight.name.replace(".base_layer", "")
            is_head = name == OUTPUT
            is_embedding = name == EMBEDDING
            if (is_head and not untied) or (is_embedding and not chunk.first):
                continue
            total += weight.size * weight.copies - padding * (is_head or is_embedding)
    return total


def _layout(megatron: argparse.Namespace) -> str:
    parts = [
        f"TP {megatron.tensor_model_parallel_size}",
        f"PP {megatron.pipeline_model_parallel_size}",
        f"CP {megatron.context_parallel_size}",
        f"DP {megatron.data_parallel_size}",
    ]
    if megatron.virtual_pipeline_model_parallel_size:
        parts.insert(2, f"VPP {megatron.virtual_pipeline_model_parallel_size}")
    text = " x ".join(parts)
    if megatron.num_experts:
        ep, etp = megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size
        rest = megatron.world_size // (ep * etp * megatron.pipeline_model_parallel_size)
        text += f"; experts: EP {ep} x ETP {etp} x DP {rest}"
    processes = "1 process" if megatron.world_size == 1 else f"{megatron.world_size} processes"
    return f"{processes} = {text}"


def _batch(args: Any, megatron: argparse.Namespace, sides: int) -> str:
    items = "samples" if sides == 1 else "pairs"
    return (
        f"{args.global_batch_size} {items} a step = micro-batches of {args.micro_batch_size} x "
        f"{megatron.data_parallel_size} data-parallel ranks x {accumulation(args, megatron)} "
        "accumulation steps"
    )


def _tokens(args: Any, megatron: argparse.Namespace, sizes: Any) -> str:
    length = megatron.seq_length
    source = "of a pack" if args.packing else "of the longest sample"
    if not args.dataset:
        source = "assumed, as no --dataset is named"
    most = length * args.global_batch_size
    if not (args.padding_free or args.packing):
        most *= sizes.sides
    return f"{length:,} a sample ({source}): at most {most:,} a step"


def _steps(args: Any, sizes: Any) -> str:
    if sizes.train_iters is None:
        return "unknown without --dataset: set --train_iters"
    samples = sizes.train_iters * args.global_batch_size
    text = f"{sizes.train_iters:,} = {samples:,} samples"
    if sizes.rows:
        text += f" = {samples / sizes.rows:.2f} epochs of {sizes.rows:,} rows"
    return text


def _table(rows: list[tuple[Stage, Memory]]) -> list[str]:
    header = ["stage", "layers", "parameters", "trained", *(f"{name} GiB" for name in _COLUMNS)]
    lines = [header]
    for stage, memory in rows:
        trained = sum(weight.size for weight in stage.weights if weight.trained)
        total = sum(weight.size for weight in stage.weights)
        values = [f"{getattr(memory, name) / GIB:.2f}" for name in _COLUMNS]
        lines.append([str(stage.number), _layers(stage), f"{total:,}", f"{trained:,}", *values])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(w.rjust(n) for w, n in zip(line, widths, strict=True)) for line in lines]


def _layers(stage: Stage) -> str:
    """Ranges of layers, counted from 0, with what stands before and after them."""
    texts = []
    for chunk in stage.chunks:
        text = "embedding+" if chunk.first else ""
        if chunk.numbers:
            text += f"{chunk.numbers[0]}-{chunk.numbers[-1]}"
        text += f"+{chunk.predicting} MTP" if chunk.predicting else ""
        texts.append(text + ("+loss" if chunk.last else ""))
    return ",".join(texts)
