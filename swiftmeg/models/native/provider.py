"""Which module stands where in a layer of native modules."""

from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

from swiftmeg.models.native.attention import DotProductAttention
from swiftmeg.models.native.experts import ColumnParallelExperts, RowParallelExperts
from swiftmeg.models.native.linear import ReplicatedLinear
from swiftmeg.models.native.mlp import GatedRowParallelLinear
from swiftmeg.models.native.norm import RMSNorm


class NativeSpecProvider(LocalSpecProvider):
    """Megatron's local linear layers with this package's norm, attention and experts."""

    def linear(self) -> type:
        """A projection that every tensor-parallel rank holds whole."""
        return ReplicatedLinear

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        """The norm of every position in a layer."""
        return RMSNorm

    def row_parallel_linear(self) -> type:
        """A projection whose input is split over tensor-parallel ranks."""
        return GatedRowParallelLinear

    def core_attention(self) -> type:
        """Attention between the projections."""
        return DotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """The experts of a layer.

        Megatron's grouped MLP needs nothing of TransformerEngine, whose name it bears, but its
        linear layers.
        """
        submodules = GroupedMLPSubmodules(
            linear_fc1=ColumnParallelExperts, linear_fc2=RowParallelExperts
        )
        return partial(TEGroupedMLP, submodules=submodules)
