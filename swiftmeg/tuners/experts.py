"""LoRA beside layers of experts: an adapter for each expert, wherever it lives, and the router's.

The factors of a rank's experts are one parameter each, so that the optimizer sees two tensors a
layer and products are grouped like the experts' own. Checkpoints hold an axis of all experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from torch import Tensor

from swiftmeg.models.native.experts import grouped_product
from swiftmeg.tuners.factors import Factor
from swiftmeg.tuners.layers import NAME, Adapter, WholeAdapter

SAME_TOKENS = "lora-same-tokens"
"""The random state that ranks share who see the same tokens of the same experts."""


class ExpertAdapter(Adapter):
    """Beside the layers of this rank's experts, which take rows x [t, in] in turn."""

    def place(self) -> Any:
        return mpu.get_expert_tensor_parallel_group()

    @property
    def first_expert(self) -> int:
        """The number in the model of the first expert here."""
        return int(mpu.get_expert_model_parallel_rank() * self.base_layer.num_gemms)

    def base_weights(self) -> list[Tensor]:
        return [getattr(self.base_layer, f"weight{i}") for i in range(self.base_layer.num_gemms)]

    def product(self, x: Tensor, factor: Factor, rows: Any) -> Tensor:
        """x times each expert's matrix, for its rows."""
        weight = factor.weight
        if factor.axis is None:
            # Every rank has its part of the gradient, of its outputs' share or its inputs'.
            weight = copy_to_tensor_model_parallel_region(weight, group=self.group)
        counts = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        fuse = getattr(self.base_layer, "fuse", True)
        return grouped_product(x, list(weight.unbind()), counts, fuse)

    def change(self, x: Tensor, *args: Any) -> Tensor:
        (rows,) = args
        hidden = self.product(x, self.A, rows) * self.scale
        return self.product(hidden, self.B, rows)

    def drop(self, x: Tensor) -> Tensor:
        dropout = self.lora_dropout[NAME]
        if not (self.training and dropout.p):
            return x
        if self.group.size() == 1:
            return dropout(x)
        name = get_expert_parallel_rng_tracker_name() if self.input_is_cut else SAME_TOKENS
        with get_cuda_rng_tracker().fork(name):
            return dropout(x)

    def factor_entries(self, prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
        return {
            f"{prefix}lora_{letter}.{NAME}.weight": self._entry(
                f"{prefix}lora_{letter}.{NAME}.weight",
                factor,
                offsets,
                2 if self.gated and letter == "B" else 1,
            )
            for letter, factor in (("A", self.A), ("B", self.B))
        }

    def _entry(self, key: str, factor: Factor, offsets: Any, halves: int) -> Any:
        """One tensor of all experts; the rows of gate and up are cut over ranks one by one."""
        rank, size = self.group.rank(), self.group.size()
        first, layers = self.first_expert, len(offsets)
        total = self.base_layer.num_gemms * mpu.get_expert_model_parallel_world_size()
        replica = (0, 0 if factor.axis is not None else rank, mpu.get_expert_data_parallel_rank())

        @torch.no_grad()
        def build(name: str, tensor: Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
            pieces = []
            for expert, matrix in enumerate(tensor):
                for half, part in enumerate(matrix.chunk(halves)):
                    cuts = [(layers, first + expert, total)]
                    if factor.axis == 1:
                        cuts.append((layers + 1, half * size + rank, halves * size))
                    elif factor.axis == 2:
                        cuts.append((layers + 2, rank, size))
                    elif halves > 1:
                        cuts.append((layers + 1, half, halves))
                    pieces.append(
                        ShardedTensor.from_rank_offsets(
                            name,
                            part,
                            *offsets,
                            *cuts,
                            replica_id=replica_id,
                            prepend_axis_num=layers + 1,
                        )
                    )
            return pieces

        @torch.no_grad()
        def merge(pieces: list[Tensor]) -> Tensor:
            groups = [pieces[i : i + halves] for i in range(0, len(pieces), halves)]
            return torch.stack([torch.cat(group) for group in groups])

        return ShardedTensorFactory(key, factor.weight, build, merge, replica)


class ColumnExpertAdapter(ExpertAdapter):
    """Outputs are split over expert-tensor-parallel ranks, which see the same tokens."""

    def factors(self, rank: int) -> tuple[Factor, Factor]:
        weight, count = self.base_layer.weight0, self.base_layer.num_gemms
        return (
            Factor((count, rank, weight.shape[1]), weight, None),
            Factor((count, weight.shape[0], rank), weight, 1),
        )


class RowExpertAdapter(ExpertAdapter):
    """Inputs are split over expert-tensor-parallel ranks, whose outputs are added up later."""

    input_is_cut = True

    def factors(self, rank: int) -> tuple[Factor, Factor]:
        weight, count = self.base_layer.weight0, self.base_layer.num_gemms
        return (
            Factor((count, rank, weight.shape[1]), weight, 2),
            Factor((count, weight.shape[0], rank), weight, None),
        )


class RouterAdapter(WholeAdapter):
    """Beside a router: the change is added to its logits, in their dtype."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        plain = self.base_layer.gating
        self.base_layer.gating = lambda hidden: self._gating(plain, hidden)
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            del self.base_layer.gating

    def _gating(self, plain: Any, hidden: Tensor) -> Tensor:
        logits: Tensor = plain(hidden)
        a, b = self.A.weight.to(logits.dtype), self.B.weight.to(logits.dtype)
        change = F.linear(F.linear(self.drop(hidden).to(logits.dtype), a) * self.scale, b)
        return logits + change


def share_random_state(adapters: list[Adapter], seed: int) -> None:
    """Add the random state of `SAME_TOKENS` where adapters will drop inputs that ranks share."""
    tracker = get_cuda_rng_tracker()
    shared = any(isinstance(each, ExpertAdapter) and each.group.size() > 1 for each in adapters)
    if shared and SAME_TOKENS not in tracker.get_states():
        replica = mpu.get_expert_data_parallel_rank() * mpu.get_expert_model_parallel_world_size()
        place = replica + mpu.get_expert_model_parallel_rank()
        stage = mpu.get_pipeline_model_parallel_rank()
        tracker.add(SAME_TOKENS, seed + 7919 + 1000 * stage + place)
