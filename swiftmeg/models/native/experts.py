"""The linear layers of a rank's experts, computed together."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

_grouped_mm = getattr(F, "grouped_mm", torch._grouped_mm)  # public since torch 2.10

_ALIGNMENT = 16
"""Bytes to which rows of the grouped product's operands must be aligned."""


class _GroupedProduct(torch.autograd.Function):
    """x @ weight[e].T for the rows of each expert e, in one kernel a direction.

    The kernel wants the weights in one tensor: a view where they lie side by side, else a copy that
    lives only while it runs. The graph keeps the parameters themselves.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, accumulate: bool, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, ends, *weights)
        ctx.accumulate = accumulate
        return _grouped_mm(x, _stacked(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        for_x: Tensor | None = None
        for_weights: list[Tensor | None] = [None] * len(weights)
        if ctx.needs_input_grad[0]:
            for_x = _grouped_mm(grad, _stacked(weights), offs=ends)
        if any(ctx.needs_input_grad[3:]):
            found = _grouped_mm(grad.t(), x, offs=ends)
            if ctx.accumulate:
                _accumulate(weights, found)
            # Megatron's hooks want gradients also where they are in its buffer already.
            for_weights[:] = found.unbind()
        return for_x, None, None, *for_weights


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view [n, *] of n equal contiguous tensors, if they follow each other in one storage."""
    first = tensors[0]
    step = first.numel() * first.element_size()
    starts = [tensor.data_ptr() for tensor in tensors]
    ends_at = first.storage_offset() + len(tensors) * first.numel()
    if (
        not all(tensor.is_contiguous() for tensor in tensors)
        or starts != list(range(starts[0], starts[0] + len(tensors) * step, step))
        or ends_at * first.element_size() > first.untyped_storage().nbytes()
    ):
        return None
    return first.detach().as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    together = side_by_side(weights)
    return torch.stack(list(weights)) if together is None else together


def _accumulate(weights: Sequence[Any], grads: Tensor) -> None:
    """Add gradients [experts, out, in] to Megatron's buffers, in one go if these lie in order."""
    buffers = [weight.main_grad for weight in weights]
    together = side_by_side(buffers)
    if together is not None:
        together.add_(grads)
    else:
        for buffer, grad in zip(buffers, grads, strict=True):
            buffer.add_(grad)
    for weight in weights:
        weight.grad_added_to_main_grad = True


def grouped_product(
    x: Tensor, weights: list[Tensor], rows: list[int], fuse: bool, accumulate: bool = False
) -> Tensor:
    """x [sum(rows), in] times each expert's weight [out, in], expert e's `rows[e]` rows in turn.

    Returns [sum(rows), out]. One kernel if `fuse` and where torch has it (bf16 on GPUs), else a
    loop. With `accumulate` the kernel's weight gradients go into Megatron's buffers, for parameters
    that have one.
    """
    if fuse and x.shape[0] > 0 and _has_kernel(x, weights[0]):
        ends = torch.tensor(rows, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if x.is_cuda:
            ends = ends.pin_memory().to(x.device, non_blocking=True)
        accumulate = accumulate and hasattr(weights[0], "grad_added_to_main_grad")
        return _GroupedProduct.apply(x.contiguous(), ends, accumulate, *weights)
    parts = zip(x.split(rows), weights, strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    aligned = all(size * x.element_size() % _ALIGNMENT == 0 for size in weight.shape)
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned


class _Experts(torch.nn.Module):
    """One linear layer of each expert on this rank: parameters `weight0`, `weight1`, ...

    Names, cuts and checkpoint entries are those of TransformerEngine's grouped linear layer.
    Communication is the token dispatcher's business.
    """

    parallel_mode: Literal["column", "row"]

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        pg_collection: ProcessGroupCollection,
        is_expert: bool = True,
        tp_comm_buffer_name: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.skip_bias_add = skip_bias_add
        self.use_bias = bias
        self.fuse = config.moe_grouped_gemm
        self.fuse_wgrad_accumulation = False  # as TransformerEngine's linear layers name it
        self.groups = pg_collection
        size = pg_collection.expt_tp.size()
        self.axis = 0 if self.parallel_mode == "column" else 1
        shape = [output_size, input_size]
        shape[self.axis] //= size
        self.shared_by_data_ranks = (
            config.expert_model_parallel_size == 1
            and config.expert_tensor_parallel_size == config.tensor_model_parallel_size
        )
        weights = [self._parameter(config, shape, cut=self.axis) for _ in range(num_gemms)]
        if config.perform_initialization:
            for weight in weights:
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init_method(weight)
        # Megatron lays out its buffers from the last parameter to the first: so the experts lie in
        # order, and one product needs no copy of them.
        for expert, weight in reversed(list(enumerate(weights))):
            self.register_parameter(f"weight{expert}", weight)
        for expert in range(num_gemms if bias else 0):
            cut = 0 if self.parallel_mode == "column" else None
            vector = self._parameter(config, shape[:1], cut)
            torch.nn.init.zeros_(vector)
            self.register_parameter(f"bias{expert}", vector)

    def _parameter(
        self, config: TransformerConfig, shape: list[int], cut: int | None
    ) -> torch.nn.Parameter:
        """An empty parameter with Megatron's marks: which group reduces it, which axis is cut."""
        parameter: Any = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        parameter.allreduce = self.shared_by_data_ranks
        parameter.tensor_model_parallel = cut is not None
        if cut is not None:
            parameter.partition_dim = cut
            parameter.partition_stride = 1
        return parameter

    def _all(self, kind: str) -> list[Tensor]:
        return [getattr(self, f"{kind}{expert}") for expert in range(self.num_gemms)]

    def _shared_biases(self) -> list[Tensor]:
        """Biases such that expert-tensor-parallel ranks, whose outputs are summed, add each once.

        Every rank has the whole gradient.
        """
        size = self.groups.expt_tp.size()
        biases = torch.stack(self._all("bias"))
        if self.parallel_mode == "row" and size > 1:
            biases = copy_to_tensor_model_parallel_region(biases / size, group=self.groups.expt_tp)
        return list(biases.unbind())

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        """Rows x [t, in], `m_splits[e]` of them for expert e, give [t, out].

        The experts' biases are added, or returned if `skip_bias_add`.
        """
        weights = self._all("weight")
        out = grouped_product(x, weights, m_splits, self.fuse, self.fuse_wgrad_accumulation)
        if not self.use_bias:
            return out, None
        if self.skip_bias_add:
            return out, self._shared_biases()
        counts = torch.tensor(m_splits, device=x.device)
        return out + torch.stack(self._all("bias")).repeat_interleave(counts, dim=0), None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """One entry for all experts of the model, a slice of it for each expert here."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        alone = metadata.get("singleton_local_shards", False)
        groups = self.groups
        first = groups.ep.rank() * self.num_gemms
        total = groups.ep.size() * self.num_gemms
        entries: dict[str, Any] = {}
        for local in range(self.num_gemms):
            state = {f"{local}.weight": getattr(self, f"weight{local}")}
            cuts = {f"{local}.weight": self.axis}
            if self.use_bias:
                state[f"{local}.bias"] = getattr(self, f"bias{local}")
                if self.parallel_mode == "column":
                    cuts[f"{local}.bias"] = 0
            offset = (len(sharded_offsets), first + local, total)
            found = make_sharded_tensors_for_checkpoint(
                state,
                "",
                cuts,
                sharded_offsets if alone else (*sharded_offsets, offset),
                tp_group=groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            key = f"{first + local}.{prefix}" if alone else prefix
            replace_prefix_for_sharding(found, f"{local}.", key)
            for name, entry in found.items():
                # Replicas of an expert are counted over its own data-parallel ranks.
                entry.replica_id = (*entry.replica_id[:2], groups.expt_dp.rank())
                entries[f"{prefix}{name.removeprefix(f'{local}.')}{local}"] = entry
        return entries


class ColumnParallelExperts(_Experts):
    """Linear layers whose output is split over expert-tensor-parallel ranks."""

    parallel_mode = "column"


class RowParallelExperts(_Experts):
    """Linear layers whose input is split over expert-tensor-parallel ranks."""

    parallel_mode = "row"
