"""Routers in training: what is said of them at the start."""

from typing import Any

import torch
from megatron.core import mpu

from swiftmeg import distributed
from swiftmeg.models.moe import Router


def settle_routers(models: list[Any], args: Any, sources: dict[str, str]) -> list[Any]:
    """Say at the start what balances the experts and whether routers learn; collective.

    A router whose weights are frozen keeps its experts' bias too: it would change what the model
    computes without being among the trained weights. Beside adapters every router does.
    """
    routers = [each for chunk in models for each in chunk.modules() if isinstance(each, Router)]
    for router in routers:
        router.frozen_expert_bias |= not router.weight.requires_grad
    biased = sum(router.enable_expert_bias for router in routers)
    learning = len(
        {
            name.partition(".router.")[0]
            for chunk in models
            for name, parameter in chunk.named_parameters()
            if ".router." in name and parameter.requires_grad  # an adapter's too
        }
    )
    counts = torch.tensor([learning, len(routers), biased], device=torch.cuda.current_device())
    torch.distributed.all_reduce(counts, group=mpu.get_pipeline_model_parallel_group())
    learning, total, biased = counts.tolist()
    if total and distributed.on_rank_zero():
        trainable = {0: "no", total: "yes"}.get(learning, f"{learning} of {total}")
        words = _balancing(args, sources, biased > 0, learning > 0)
        print(f"router trainable: {trainable}; {words}", flush=True)
    return models


def _balancing(args: Any, sources: dict[str, str], biased: bool, learning: bool) -> str:
    weights = zip(args.moe_router_load_balancing_type, args.moe_aux_loss_coeff, strict=True)
    source = sources["moe_aux_loss_coeff"]
    parts = [f"{kind} {weight:g} ({source})" for kind, weight in weights if weight]
    if not parts:
        parts.append(f"no loss ({source})")
    if args.moe_z_loss_coeff:
        parts.append(f"z-loss {args.moe_z_loss_coeff:g}")
    if biased:
        rate = f"moved by {args.moe_router_bias_update_rate:g} a step" if learning else "kept"
        parts.append(f"expert bias {rate}")
    return "balance of experts: " + ", ".join(parts)
