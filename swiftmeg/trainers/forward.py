"""One micro-batch through the model, whatever is then made of its output."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from swiftmeg.models.context import cut_batch
from swiftmeg.models.head import TokenStatistics, output_options
from swiftmeg.models.router_losses import token_marks

Batch = dict[str, Tensor]

_ON_HOST = ("max_seqlen", "num_samples", "num_tokens")


def take_batch(iterator: Iterator[Batch]) -> Batch:
    """The next micro-batch of a Collator, where the model is, as far as this rank holds it.

    Tensors [b, s] are cut over context-parallel ranks. What the host needs stays there.
    """
    batch = dict(next(iterator))
    on_host = {name: batch.pop(name) for name in _ON_HOST if name in batch}
    device = torch.cuda.current_device()
    # Only copies from pinned memory do not wait for what the GPU has still to do.
    batch = {
        name: (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)
        for name, tensor in batch.items()
    }
    size = mpu.get_context_parallel_world_size()
    if size > 1:
        batch = cut_batch(batch, mpu.get_context_parallel_rank(), size)
    return batch | on_host


def run_model(model: Any, batch: Batch, statistics: TokenStatistics | None = None) -> Tensor:
    """The output of a model part for a batch of `take_batch`.

    On the last pipeline stage that is the cross entropy of every label, fp32 [b, s]: a negative
    log-probability in nats, also where nothing is trained; it fills in the `statistics`. Elsewhere
    hidden states.
    """
    marks = None
    if get_model_config(model).num_moe_experts is not None:
        marks = token_marks(batch["samples"], batch["weights"], int(batch["num_samples"]))
    output: Tensor = model(
        batch["input_ids"],
        batch["position_ids"],
        None,
        labels=batch["labels"].clamp(min=0),
        loss_mask=batch["weights"],
        packed_seq_params=packed_params(batch.get("cu_seqlens"), batch.get("max_seqlen")),
        padding_mask=marks,
        **output_options(unwrap_model(model), statistics),
    )
    return output


def packed_params(cu_seqlens: Tensor | None, longest: Tensor | None) -> PackedSeqParams | None:
    """Describe the segments of a padding-free batch to Megatron's attention and RoPE.

    Padding inside a segment counts as its last tokens: earlier ones do not attend to it, kernels
    without support for gaps can run, and no chunk of a rank is ever without a token.
    None for a padded batch, which has no `cu_seqlens` [segments + 1].
    """
    if cu_seqlens is None or longest is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=int(longest),
        max_seqlen_kv=int(longest),
    )
