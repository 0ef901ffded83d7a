"""The model of every rank, built on the meta device: parameters without storage.

Ranks that differ in their tensor-, expert-, context- or data-parallel place only hold parts of
equal size, so one rank of each pipeline stage stands for all.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.dist_utils import build_virtual_pipeline_stages
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from swiftmeg import upstream
from swiftmeg.models.build import model_config
from swiftmeg.models.layers import moe_layers

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
    config = model_config(megatron, hf_config)
    config.transformer.perform_initialization = False
    config.finalize()
    stages = []
    for number in range(megatron.pipeline_model_parallel_size):
        with _as_rank_of_stage(megatron, number), _OnMeta():
            stages.append(_build(config))
    with _as_rank_of_stage(megatron, 0):
        models = [model for stage in stages for model in stage]
        for hook in hooks or []:
            hook(models)
        kinds = moe_layers(config.transformer)
        return [
            Stage(number, tuple(_chunk(model, kinds) for model in stage))
            for number, stage in enumerate(stages)
        ]


def _build(config: Any) -> list[Any]:
    """The chunks of this rank."""
    chunks: list[Any] = build_virtual_pipeline_stages(
        config.get_builder_cls()(config).build_model,
        ProcessGroupCollection.use_mpu_process_groups(),
        config.transformer.virtual_pipeline_model_parallel_size,
        ModelType.encoder_or_decoder,
    )
    return chunks


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


@contextlib.contextmanager
def _as_rank_of_stage(args: argparse.Namespace, number: int) -> Iterator[None]:
    """Be the first rank of pipeline stage `number`, in groups that do not communicate."""
    world = args.world_size
    rank = number * (world // args.pipeline_model_parallel_size)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with upstream.only_own_groups():
            mpu.initialize_model_parallel(
                args.tensor_model_parallel_size,
                args.pipeline_model_parallel_size,
                args.virtual_pipeline_model_parallel_size,
                context_parallel_size=args.context_parallel_size,
                expert_model_parallel_size=args.expert_model_parallel_size,
                expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                create_gloo_process_groups=False,
            )
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
        yield
    finally:
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


_FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "tensor",
        "as_tensor", "arange", "linspace", "eye", "empty_like", "zeros_like", "ones_like",
        "full_like",
    )
)  # fmt: skip


class _OnMeta(TorchFunctionMode):
    """Every new tensor is one of the meta device, whatever device the code names."""

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
