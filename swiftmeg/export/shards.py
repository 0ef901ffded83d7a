"""The live weights of this rank, under the names and the cuts that weight rows speak of."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
"""Where TransformerEngine keeps a norm inside a linear layer -> the norm's own name."""

ADAPTER_FACTORS = ("lora_A", "lora_B", "lora_magnitude_vector")
"""What PEFT calls the parameters that it puts beside a layer, which is then a `base_layer`."""

_EXPERT = re.compile(r"(.*\.mlp\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)")

_BUFFERS = ("router.expert_bias",)
"""Buffers, by suffix, that a checkpoint holds like weights."""


@dataclass(frozen=True)
class LiveWeight:
    """One weight of this rank: its layout-independent name and how the layout cuts it."""

    name: str
    tensor: torch.Tensor
    axis: int | None
    """The axis that tensor parallelism cuts; None where every rank holds all of it."""
    routed: bool = False
    """A routed expert's: cut over the expert-tensor-parallel group, not the tensor-parallel one."""

    @property
    def group(self) -> torch.distributed.ProcessGroup:
        """The ranks whose shards make the whole."""
        if self.routed:
            return mpu.get_expert_tensor_parallel_group()
        return mpu.get_tensor_model_parallel_group()

    @property
    def rank(self) -> int:
        """This rank's number in `group`."""
        return self.group.rank()

    @property
    def group_size(self) -> int:
        """Ranks in `group`."""
        return self.group.size()

    @property
    def pieces(self) -> int:
        """How many shards make the whole."""
        return self.group_size if self.axis is not None else 1


def live_weights(models: list[Any]) -> Iterator[LiveWeight]:
    """Every weight of this rank's model chunks, in the order of the layers; no adapters."""
    for chunk in unwrap_model(models):
        buffers = [pair for pair in chunk.named_buffers() if pair[0].endswith(_BUFFERS)]
        for name, tensor in (*chunk.named_parameters(), *buffers):
            if any(f".{factor}." in name for factor in ADAPTER_FACTORS):
                continue
            name = name.replace(".base_layer.", ".")
            cut = getattr(tensor, "tensor_model_parallel", False)
            axis = tensor.partition_dim if cut else None
            yield LiveWeight(global_name(chunk, name), tensor, axis, bool(_EXPERT.fullmatch(name)))


def global_name(chunk: Any, name: str) -> str:
    """The name in the whole model of a weight or module that is `name` in this rank's `chunk`."""

    def number(match: re.Match[str]) -> str:
        layer = chunk.decoder.layers[int(match[1])]
        return f"decoder.layers.{layer.layer_number - 1}."

    name = re.sub(r"^decoder\.layers\.(\d+)\.", number, name)
    if match := _EXPERT.fullmatch(name):
        here = chunk.config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
        first = here * mpu.get_expert_model_parallel_rank()
        return f"{match[1]}{first + int(match[2])}"
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def spellings(name: str) -> tuple[str, ...]:
    """A weight's name, and the one that it has inside TransformerEngine's fused layers."""
    fused = (name.replace(plain, inside) for inside, plain in _FUSED_NORMS.items() if plain in name)
    return (name, *fused)


def gather_shards(live: LiveWeight, receiver: int) -> list[torch.Tensor]:
    """Collect a weight's shards on the group's rank `receiver`, on the CPU; others get none.

    Replicated weights (`axis` None) travel nowhere.
    """
    rank, size = live.rank, live.group_size
    tensor = live.tensor.detach()
    if live.axis is None or size == 1:
        return [tensor.cpu()] if rank == receiver else []
    shards = [torch.empty_like(tensor) for _ in range(size)] if rank == receiver else None
    torch.distributed.gather(tensor.contiguous(), shards, group=live.group, group_dst=receiver)
    return [shard.cpu() for shard in shards] if shards else []
