"""Losses beside the objective's first term in the log: those of routers and prediction modules."""

from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from swiftmeg.models.loss_sums import LOSSES
from swiftmeg.models.mtp import acceptance_name, loss_name

_ROUTER_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Types of balancing -> the names that Megatron logs their losses under."""


def router_loss_names(args: Any) -> list[str]:
    """The losses of routers that a run logs, from Megatron's namespace."""
    if args.num_experts is None:
        return []
    kinds = args.moe_router_load_balancing_type
    names = [_ROUTER_LOSSES[kind] for kind in kinds if kind in _ROUTER_LOSSES]
    return names if args.moe_z_loss_coeff is None else [*names, "z_loss"]


def step_losses(args: Any) -> dict[str, float]:
    """The last step's losses, which Megatron's own log takes from here too.

    Collective; `args` is Megatron's namespace.
    """
    modules = range(1, 1 + (args.mtp_num_layers or 0))
    routers = router_loss_names(args)
    names = [name(module) for module in modules for name in (loss_name, acceptance_name)]
    found = LOSSES.take(routers + names)
    if mpu.get_pipeline_model_parallel_rank() == 0:
        _record_routers({name: found[name] for name in routers}, args)
    if modules:
        _record_predictions(
            [found[loss_name(module)] for module in modules],
            [found[acceptance_name(module)] for module in modules],
        )
    return found


def _record_routers(losses: dict[str, float], args: Any) -> None:
    tracker = get_moe_metrics_tracker()
    further = args.mtp_num_layers or 0
    for name, value in losses.items():
        # It will divide by the layers with experts and the micro-batches of a step.
        layers = tracker._count_moe_layers(args.num_layers, args.moe_layer_freq, further)
        total = torch.tensor(value * layers * get_num_microbatches())
        total = total.to(torch.cuda.current_device())
        tracker.record(name, total, 1, args.num_layers + further, needs_dp_avg=False)


def _record_predictions(losses: list[float], percentages: list[float]) -> None:
    device = torch.cuda.current_device()
    MTPLossLoggingHelper.tracker |= {
        # It will divide by the micro-batches of a step.
        "loss_values": torch.tensor(losses, device=device) * get_num_microbatches(),
        "correct_values": torch.tensor(percentages, device=device) / 100,
        "total_values": torch.ones(len(losses), device=device),
    }
