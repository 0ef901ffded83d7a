"""The live parameters of this rank, under the names and the cuts that weight rows speak of."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Where TransformerEngine keeps a norm inside a linear layer -> the norm's own name."""


@dataclass(frozen=True)
class LiveWeight:
    """One parameter of this rank: its layout-independent name and the axis that TP cuts."""

    name: str
    parameter: torch.nn.Parameter
    axis: int | None


def live_weights(models: list[Any]) -> Iterator[LiveWeight]:
    """Every parameter of this rank's model chunks, in the order of the layers."""
    for chunk in unwrap_model(models):
        for name, parameter in chunk.named_parameters():
            cut = getattr(parameter, "tensor_model_parallel", False)
            axis = parameter.partition_dim if cut else None
            yield LiveWeight(_global_name(chunk, name), parameter, axis)


def _global_name(chunk: Any, name: str) -> str:
    """Replace the layer's place on this stage by its place in the model."""

    def number(match: re.Match[str]) -> str:
        layer = chunk.decoder.layers[int(match[1])]
        return f"decoder.layers.{layer.layer_number - 1}."

    name = re.sub(r"^decoder\.layers\.(\d+)\.", number, name)
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def is_writer() -> bool:
    """True on the one rank of each pipeline stage that puts tensors together and writes them."""
    return mpu.get_tensor_model_parallel_rank() == 0 and holds_first_copy()


def holds_first_copy() -> bool:
    """True on the ranks of the first data-parallel replica."""
    return mpu.get_data_parallel_rank(with_context_parallel=True) == 0


def gather_shards(parameter: torch.Tensor, axis: int | None) -> list[torch.Tensor]:
    """Collect a parameter's tensor-parallel shards on the group's first rank, on the CPU.

    Other ranks get an empty list. Replicated parameters (`axis` None) travel nowhere.
    """
    group = mpu.get_tensor_model_parallel_group()
    size = mpu.get_tensor_model_parallel_world_size()
    first = mpu.get_tensor_model_parallel_rank() == 0
    tensor = parameter.detach()
    if axis is None or size == 1:
        return [tensor.cpu()] if first else []
    shards = [torch.empty_like(tensor) for _ in range(size)] if first else None
    torch.distributed.gather(tensor.contiguous(), shards, group=group, group_dst=0)
    return [shard.cpu() for shard in shards] if shards else []
