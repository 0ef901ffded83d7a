"""Supervised fine-tuning: cross entropy on the tokens that the labels name."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from swiftmeg.models.context import cut_batch
from swiftmeg.models.moe import token_marks
from swiftmeg.trainers.log import TokenCounter

IGNORED = -100


def to_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move a batch to where the model is."""
    device = torch.cuda.current_device()
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


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


def loss_function(
    mask: Tensor, losses: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses [b, s], times `weights` [b, s], where `mask` [b, s] is 1; count those places.

    Megatron adds sums and counts over micro-batches and data-parallel ranks and divides once, so
    the result does not depend on how the global batch is split. A micro-batch, a rank's chunks of
    it or a whole step without a trained token counts as zero.
    """
    scale = mask if weights is None else mask * weights
    total = (losses.float() * scale).sum()
    count = mask.sum()
    # Beside any token the addition is lost in rounding; without one it makes 0 / 0 a zero.
    report = torch.stack([total.detach(), count + torch.finfo(count.dtype).tiny])
    return total, count.to(torch.int), {"lm loss": report}


def _marks(model: Any, samples: Tensor, labels: Tensor, count: int) -> Tensor | None:
    """What routers have to know of the tokens; None where the model has no experts."""
    if get_model_config(model).num_moe_experts is None:
        return None
    return token_marks(samples, labels != IGNORED, count)


def make_forward_step(counter: TokenCounter) -> Callable[..., Any]:
    """The forward step that Megatron's schedules call for every micro-batch."""

    def forward_step(
        iterator: Iterator[dict[str, Tensor]], model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        batch = next(iterator)
        if not get_attr_wrapped_model(model, "vp_stage"):  # each model part gets the same batches
            counter.add(batch)
        longest = batch.pop("max_seqlen", None)  # wanted on the host
        count = int(batch.pop("num_samples"))
        batch = to_device(batch)
        if mpu.get_context_parallel_world_size() > 1:
            batch = cut_batch(
                batch, mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
            )
        packed = packed_params(batch.get("cu_seqlens"), longest)
        labels = batch["labels"]
        mask = (labels != IGNORED).float()
        output = model(
            batch["input_ids"],
            batch["position_ids"],
            None,
            labels=labels.clamp(min=0),
            loss_mask=mask,
            packed_seq_params=packed,
            padding_mask=_marks(model, batch["samples"], labels, count),
        )
        weights = {"weights": batch["loss_scale"]} if "loss_scale" in batch else {}
        return output, partial(loss_function, mask, **weights)

    return forward_step
