"""LoRA beside Megatron's layers (arXiv:2106.09685), the same function in every layout.

Every layer computes `base(x) + scale * B(A(dropout(x)))`. Like the weight beside it, one factor is
cut over tensor-parallel ranks: B of a column-parallel layer along its outputs, A of a row-parallel
layer along its inputs. Every rank holds all of the other factor, and its gradient must be the
whole one on every rank:

* without sequence parallelism the rank-r activations between the factors pass through Megatron's
  own collectives, whose backward passes make every gradient behind them whole;
* with sequence parallelism a replicated factor sees this rank's positions only, and its mark
  `sequence_parallel` makes Megatron sum its gradient over the ranks once a step, as for norms;
* inside experts no layer communicates, because the token dispatcher does: there a replicated
  factor itself passes through `copy_to_tensor_model_parallel_region`, the identity whose backward
  pass is a sum over the expert-tensor-parallel ranks.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from peft.tuners.lora import LoraConfig, LoraLayer
from torch import Tensor

from swiftmeg.tuners.dora import row_factors, row_norms
from swiftmeg.tuners.factors import Factor, Magnitude

NAME = "default"
"""PEFT's name of the one adapter."""


class Adapter(torch.nn.Module, LoraLayer):
    """LoRA beside one layer, which goes on as `base_layer`; what it lacks is that layer's."""

    input_is_cut = False
    """Whether tensor-parallel ranks see different parts of the input, so drop different ones."""

    def __init__(
        self,
        base_layer: Any,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        **options: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.group = self.place()
        self.sequence_parallel = bool(getattr(base_layer, "sequence_parallel", False))
        self.gated = False
        """Whether the outputs are a gate and what it scales, one after the other."""
        self.update_layer(adapter_name, r, lora_alpha, config)

    def place(self) -> Any:
        """The ranks that the layer's weight is cut over."""
        return mpu.get_tensor_model_parallel_group()

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[None, None]:
        return None, None  # PEFT's guess; the shapes come from the weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig
    ) -> None:
        """Make the factors; both are zero until `initialise` fills them."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = torch.nn.Dropout(config.lora_dropout)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = self.factors(r)
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = self.new_magnitude()
        self.set_adapter([adapter_name])

    @property
    def A(self) -> Factor:
        """The factor that reads the input."""
        return self.lora_A[NAME]

    @property
    def B(self) -> Factor:
        """The factor that writes the output."""
        return self.lora_B[NAME]

    @property
    def magnitude(self) -> Magnitude | None:
        """DoRA's lengths of the weight's rows; None without DoRA."""
        return self.lora_magnitude_vector[NAME] if self.lora_magnitude_vector else None

    @property
    def alpha(self) -> float:
        """What B @ A is multiplied by, before it is divided for the rank."""
        return float(self.lora_alpha[NAME])

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by."""
        return float(self.scaling[NAME])

    def base_weights(self) -> list[Tensor]:
        """The weights that B @ A adds to: one, or one for each expert here."""
        return [self.base_layer.weight]

    def factors(self, rank: int) -> tuple[Factor, Factor]:
        """New factors A and B."""
        raise NotImplementedError

    def new_magnitude(self) -> Magnitude:
        """New lengths of the rows, cut and made whole like B."""
        magnitude = Magnitude(len(self.B.weight), self.B.weight, self.B.axis)
        if getattr(self.B.weight, "sequence_parallel", False):
            magnitude.sum_over_positions()
        return magnitude

    def norms(self) -> Tensor:
        """fp32 norms of the rows, here, of the weight and its adapter together [out]."""
        group = self.group if self.A.axis is not None else None
        return row_norms(self.matrix(), self.A.weight, self.B.weight, self.scale, group)

    def matrix(self) -> Tensor:
        """The weight as B @ A adds to it, [out, in]."""
        weight: Tensor = self.base_layer.weight
        return weight

    def change(self, x: Tensor, *args: Any) -> Tensor:
        """What LoRA adds to the layer's output for input `x`, which has been dropped from."""
        raise NotImplementedError

    def plain(self, x: Tensor) -> Tensor:
        """What the weight alone, without a bias, makes of input `x`, in the form of `change`."""
        raise NotImplementedError

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the input, with one mask for ranks that see the same and others else."""
        dropout = self.lora_dropout[NAME]
        if not (self.training and dropout.p):
            return x
        if self.group.size() > 1 and (self.input_is_cut or self.sequence_parallel):
            with get_cuda_rng_tracker().fork():
                return dropout(x)
        return dropout(x)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The layer's output with LoRA, and the bias that Megatron adds later."""
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        result, x, bias = self._base(x, *args, **kwargs)
        dropped = self.drop(x)
        change = self.change(dropped, *args)
        if self.magnitude is not None:
            return self._with_lengths(result, change, x, dropped, bias), bias
        return result + self._like(result, change), bias

    def _like(self, result: Tensor, change: Tensor) -> Tensor:
        """`change` with the outputs of all ranks where the layer gathers its own."""
        if change.shape[-1] == result.shape[-1]:
            return change
        return gather_from_tensor_model_parallel_region(change, group=self.group)

    def _with_lengths(
        self, result: Tensor, change: Tensor, x: Tensor, dropped: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The layer's output with DoRA; a bias keeps its length."""
        assert self.magnitude is not None
        factor = self._like(result, row_factors(self.magnitude.weight, self.norms())[None])
        if dropped is not x:
            base = self._like(result, self.plain(dropped))
        else:
            inside = getattr(self.base_layer, "bias", None) if bias is None else None
            base = result if inside is None or not inside.numel() else result - inside
        longer, factor = (factor - 1).to(result.dtype), factor.to(result.dtype)
        return result + longer * base + factor * self._like(result, change)

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output of the layer, its input behind a norm inside it, and its bias."""
        if not hasattr(self.base_layer, "return_layernorm_output"):
            result, bias = self.base_layer(x, *args, **kwargs)
            return result, x, bias
        # TransformerEngine's norm and linear layer in one: its norm's output is LoRA's input.
        self.base_layer.return_layernorm_output = True
        try:
            output = self.base_layer(x, *args, **kwargs)
        finally:
            self.base_layer.return_layernorm_output = False
        if self.base_layer.te_return_bias:
            result, bias, normed = output
        else:
            (result, normed), bias = output
        return result, normed, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Checkpoint entries of the layer, as if it were alone, and of its factors."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        entries = sharded_state_dict_default(self.base_layer, prefix, sharded_offsets, metadata)
        return entries | self.factor_entries(prefix, sharded_offsets, metadata)

    def factor_entries(self, prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
        """Checkpoint entries of the factors."""
        factors = {f"lora_A.{NAME}.weight": self.A, f"lora_B.{NAME}.weight": self.B}
        if self.magnitude is not None:
            factors[f"lora_magnitude_vector.{NAME}.weight"] = self.magnitude
        entries = make_sharded_tensors_for_checkpoint(
            {name: factor.weight for name, factor in factors.items()},
            prefix,
            {name: each.axis for name, each in factors.items() if each.axis is not None},
            offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in entries if self.gated else ():
            if ".lora_A." not in f".{name}":
                entries[name] = apply_swiglu_sharded_factory(entries[name], offsets)
        return entries


class ColumnAdapter(Adapter):
    """Beside a layer whose outputs are split over ranks: A is whole, B is cut like the weight."""

    def factors(self, rank: int) -> tuple[Factor, Factor]:
        weight = self.base_layer.weight
        a = Factor((rank, weight.shape[1]), weight, None)
        if self.sequence_parallel:
            a.sum_over_positions()
        return a, Factor((weight.shape[0], rank), weight, 0)

    def change(self, x: Tensor, *args: Any) -> Tensor:
        hidden = self.A(x) * self.scale
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.group)
        return self.B(hidden)

    def plain(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=True, group=self.group
            )
        else:
            x = copy_to_tensor_model_parallel_region(x, group=self.group)
        return F.linear(x, self.base_layer.weight)


class RowAdapter(Adapter):
    """Beside a layer whose inputs are split over ranks: A is cut like the weight, B is whole."""

    input_is_cut = True

    def factors(self, rank: int) -> tuple[Factor, Factor]:
        weight = self.base_layer.weight
        b = Factor((weight.shape[0], rank), weight, None)
        if self.sequence_parallel:
            b.sum_over_positions()
        return Factor((rank, weight.shape[1]), weight, 1), b

    def change(self, x: Tensor, *args: Any) -> Tensor:
        return self.B(self._sum(self.A(x) * self.scale))

    def plain(self, x: Tensor) -> Tensor:
        return self._sum(F.linear(x, self.base_layer.weight))

    def _sum(self, part: Tensor) -> Tensor:
        """What the ranks have of the same outputs, added up."""
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(part, group=self.group)
        return reduce_from_tensor_model_parallel_region(part, group=self.group)


class WholeAdapter(Adapter):
    """Beside a layer that every rank holds whole, such as a down projection of MLA."""

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        marked = getattr(base_layer.weight, "sequence_parallel", False)
        self.sequence_parallel = self.group.size() > 1 and bool(marked)
        if self.sequence_parallel:
            for factor in (self.A, self.B, self.magnitude):
                if factor is not None:
                    factor.sum_over_positions()

    def factors(self, rank: int) -> tuple[Factor, Factor]:
        weight = self.base_layer.weight
        return (
            Factor((rank, weight.shape[1]), weight, None),
            Factor((weight.shape[0], rank), weight, None),
        )

    def change(self, x: Tensor, *args: Any) -> Tensor:
        return self.B(self.A(x) * self.scale)

    def plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base_layer.weight)
