"""Multi-token prediction modules (DeepSeek-V3, arXiv:2412.19437, section 2.2): input and loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    _compute_mtp_acceptance_counts,
    roll_tensor,
)
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.models.head import TokenStatistics, skips_logits, token_losses
from swiftmeg.models.loss_sums import LOSSES


def attach_prediction_losses(
    hidden_states: Tensor,
    *,
    labels: Tensor | None,
    loss_mask: Tensor,
    output_layer: Callable[..., tuple[Tensor, Any]],
    output_weight: Tensor | None,
    is_training: bool,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    config: Any,
    cp_group: torch.distributed.ProcessGroup,
    tp_group: torch.distributed.ProcessGroup,
    packed_seq_params: PackedSeqParams | None,
    **others: Any,
) -> Tensor:
    """The decoder's output [s, b, h], with the modules' losses added to the objective.

    Takes the arguments of Megatron's `process_mtp_loss`; `hidden_states` [(1 + modules) * s, b, h]
    are the decoder's output and the modules'. Module k's label at a place is the decoder's label k
    places on, in the same sample, with its weight in the objective (`loss_mask` [b, s]). As in the
    paper (equations 24 and 25), the losses are divided by what the decoder's loss is divided by:
    a constant of the global batch, whatever its micro-batches, ranks and packs are.
    """
    output, *modules = hidden_states.chunk(1 + config.mtp_num_layers)
    if labels is None or not is_training:
        return output
    scale = config.mtp_loss_scaling_factor / config.mtp_num_layers
    if not config.calculate_per_token_loss:  # a mean over each micro-batch
        scale = scale / loss_mask.sum().clamp(min=1)
    if config.mtp_detach_heads:
        weight = output_layer.weight if output_weight is None else output_weight  # type: ignore[attr-defined]
        output_weight = weight.detach()
    shift = partial(roll_tensor, cp_group=cp_group, packed_seq_params=packed_seq_params)
    for number, hidden in enumerate(modules, start=1):
        labels, _ = shift(labels)
        loss_mask, count = shift(loss_mask)
        if skips_logits(output_layer):
            seen = TokenStatistics()
            losses = token_losses(
                hidden_states=hidden,
                output_layer=output_layer,
                output_weight=output_weight,
                labels=labels,
                context=seen,
            )
            trained = loss_mask.bool()
            hits, places = (seen.is_likeliest * trained).sum(), trained.sum().float()
        else:
            logits, _ = output_layer(hidden, weight=output_weight)
            hits, places = _compute_mtp_acceptance_counts(
                logits, labels, loss_mask, output_layer, None, tp_group
            )
            losses = compute_language_model_loss(labels, logits)
        losses = losses * loss_mask
        LOSSES.add(loss_name(number), losses.sum(), count)
        LOSSES.add(acceptance_name(number), 100 * hits, places)
        output = MTPLossAutoScaler.apply(output, scale * losses)
    return output


def loss_name(number: int) -> str:
    """What Megatron calls the loss of module `number`, counted from 1: a mean over its labels."""
    return f"mtp_{number} loss"


def acceptance_name(number: int) -> str:
    """What Megatron calls the percentage of labels that module `number` finds likeliest."""
    return f"mtp_{number}_acceptance_rate"


def read_before_norm(model: Any) -> None:
    """Let the modules of a GPTModel read the decoder's output before the final norm.

    UserError where a pipeline layout puts the modules apart from the decoder's last layer.
    """
    norm = model.decoder.final_layernorm
    if norm is None:
        raise UserError(
            "pipeline_model_parallel_layout: prediction modules of this model belong to the stage "
            "of the decoder's last layer: move them there"
        )
    predict = model.mtp.forward
    entered: list[Tensor] = []

    def enter(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered[:] = inputs[:1]

    def forward(*, hidden_states: Tensor, **others: Any) -> Tensor:
        joined = predict(hidden_states=entered.pop(), **others)
        return torch.cat([hidden_states, joined[len(hidden_states) :]])

    norm.register_forward_pre_hook(enter)
    model.mtp.forward = forward
