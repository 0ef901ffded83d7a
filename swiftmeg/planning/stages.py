"""The model of every rank, built on the meta device: parameters without storage.

Ranks that differ in their tensor-, expert-, context- or data-parallel place only hold parts of
equal size, so one rank of each pipeline stage stands for all.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu

from swiftmeg.models.layers import moe_layers
from swiftmeg.models.meta import build_chunks, describe, seat

Hook = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class Weight:
    """One parameter of a rank."""

    name: str
    size: int
    """Elements on this rank."""
    copies: int
    """Parts of this size that make the whole parameter."""
    expert: bool
    trained: bool


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of a rank; a stage has several with virtual pipeline parallelism."""

    numbers: tuple[int, ...]
    """Layers, counted from 0."""
    experts: tuple[bool, ...]
    """For each of them whether it has experts."""
    predicting: int
    """Further layers that predict tokens ahead (MTP)."""
    first: bool
    """Holds the embedding."""
    last: bool
    """Computes the loss."""
    weights: tuple[Weight, ...]


@dataclass(frozen=True)
class Stage:
    """What every rank of one pipeline stage holds."""

    number: int
    chunks: tuple[Chunk, ...]

    @property
    def weights(self) -> list[Weight]:
        """The parameters of all chunks."""
        return [weight for chunk in self.chunks for weight in chunk.weights]


def build_stages(
    megatron: argparse.Namespace, hf_config: Any, hooks: list[Hook] | None = None
) -> list[Stage]:
    """Build each pipeline stage once; `hooks` change the bare chunks of all of them together.

    `megatron` is a validated namespace of native layers. Leaves no process group behind.
    """
    config = describe(megatron, hf_config)
    ranks = megatron.world_size // megatron.pipeline_model_parallel_size
    stages = []
    for number in range(megatron.pipeline_model_parallel_size):
        with seat(megatron, number * ranks) as groups:
            stages.append(build_chunks(config, groups))
    with seat(megatron, 0):
        models = [model for stage in stages for model in stage]
        for hook in hooks or []:
            hook(models)
        kinds = moe_layers(config.transformer)
        return [
            Stage(number, tuple(_chunk(model, kinds) for model in stage))
            for number, stage in enumerate(stages)
        ]


def _chunk(model: Any, kinds: list[bool]) -> Chunk:
    numbers = tuple(layer.layer_number - 1 for layer in model.decoder.layers)
    return Chunk(
        numbers=numbers,
        experts=tuple(kinds[number] for number in numbers),
        predicting=len(model.mtp.layers) if model.mtp_process else 0,
        first=model.pre_process,
        last=model.post_process,
        weights=tuple(_weight(name, each) for name, each in model.named_parameters()),
    )


def _weight(name: str, parameter: torch.nn.Parameter) -> Weight:
    expert = not getattr(parameter, "allreduce", True)
    copies = 1
    if getattr(parameter, "tensor_model_parallel", False):
        copies = (
            mpu.get_expert_tensor_parallel_world_size()
            if expert
            else mpu.get_tensor_model_parallel_world_size()
        )
    if expert:
        copies *= mpu.get_expert_model_parallel_world_size()
    return Weight(name, parameter.numel(), copies, expert, parameter.requires_grad)
