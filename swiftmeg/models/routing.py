"""How a router chooses experts where Megatron's own ways do not reach.

Each function takes fp32-able logits [tokens, experts] and returns the weights of the chosen experts
and the choice itself, both [tokens, experts], zero and false elsewhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor

from swiftmeg.models.arguments import LayerSwitches

Choice = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""(router, logits) -> (weights, chosen)"""

_LEAST_SUM = 1e-12
"""ERNIE's `moe_norm_min`: the least sum that weights are divided by."""


def choice_of(switches: LayerSwitches, groups: int | None) -> Choice | None:
    """What replaces Megatron's choice for a family whose experts are in `groups`, if anything."""
    if switches.router_softmax_bias:
        return with_bias_on_softmax
    if switches.router_best_of_group:
        return from_groups_with_the_best
    return from_groups_with_the_best_two if groups else None


def with_bias_on_softmax(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """ERNIE 4.5: softmax scores choose with the expert bias and weigh without, summing to one."""
    scores = logits.float().softmax(dim=-1)
    best = (scores + router.expert_bias).topk(router.topk, dim=-1).indices
    weights = scores.gather(1, best)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=_LEAST_SUM)
    return _spread(weights, best, logits)


def from_groups_with_the_best(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2 (arXiv:2405.04434): only in the groups whose best expert scores highest."""
    config = router.config
    scores = logits.float().softmax(dim=-1)
    open_groups = _within_groups(scores, 1, config)
    weights, best = scores.masked_fill(~open_groups, 0.0).topk(router.topk, dim=-1)
    return _spread(weights * (config.moe_router_topk_scaling_factor or 1.0), best, logits)


def from_groups_with_the_best_two(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3 (arXiv:2412.19437): only in the groups whose two best experts score highest.

    Megatron's own choice counts as many experts of a group as a token may have of each group.
    """
    config = router.config
    scores = logits.float().sigmoid()
    if router.expert_bias is not None:
        scores = scores + router.expert_bias
    open_groups = _within_groups(scores, 2, config)
    best = scores.masked_fill(~open_groups, float("-inf")).topk(router.topk, dim=-1).indices
    weights, chosen = topk_routing_with_score_function(
        logits,
        router.topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function="sigmoid",
        precomputed_indices=best,
    )
    return weights, chosen


def _within_groups(scores: Tensor, count: int, config: Any) -> Tensor:
    """Whether each expert is in one of the groups whose `count` best experts score highest."""
    grouped = scores.unflatten(1, (config.moe_router_num_groups, -1))
    strength = grouped.topk(count, dim=-1).values.sum(dim=-1)
    groups = strength.topk(config.moe_router_group_topk, dim=-1).indices
    open_groups = torch.zeros_like(strength, dtype=torch.bool).scatter(1, groups, True)
    return open_groups[..., None].expand_as(grouped).flatten(1)


def _spread(weights: Tensor, best: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    empty = torch.zeros_like(logits)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, True)
    return empty.scatter(1, best, weights.type_as(logits)), chosen
