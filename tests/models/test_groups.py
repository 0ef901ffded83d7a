"""Experts are chosen within groups as DeepSeek-V3's code does, whatever the numbers."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from swiftmeg.errors import UserError
from swiftmeg.models.arguments import sigmoid_router_args
from swiftmeg.models.routing import from_groups_with_the_best_two

EXPERTS = 24
NUMBERS = [
    (topk, groups, chosen)
    for topk, groups, chosen in itertools.product((2, 3, 5, 8), (2, 3, 4, 6, 8, 12), (1, 2, 3, 5))
    if chosen < groups and topk <= chosen * EXPERTS // groups
]


def test_the_choice_is_that_of_transformers() -> None:
    for topk, groups, chosen in NUMBERS:
        torch.manual_seed(topk)
        config = DeepseekV3Config(
            hidden_size=EXPERTS, n_routed_experts=EXPERTS, num_experts_per_tok=topk,
            n_group=groups, topk_group=chosen, routed_scaling_factor=1.7,
        )  # fmt: skip
        theirs = DeepseekV3TopkRouter(config)
        theirs.weight.data = torch.eye(EXPERTS)
        theirs.e_score_correction_bias.normal_(0, 0.3)
        logits, weights, best = theirs(torch.randn(200, EXPERTS))
        args = sigmoid_router_args(config.to_dict(), topk)
        router: Any = SimpleNamespace(
            topk=topk, expert_bias=theirs.e_score_correction_bias, config=SimpleNamespace(**args)
        )
        ours, map_ = from_groups_with_the_best_two(router, logits)
        assert torch.allclose(ours, torch.zeros_like(ours).scatter(1, best, weights), atol=1e-6)
        assert torch.equal(map_, ours != 0)


@pytest.mark.parametrize(
    ("topk", "groups", "chosen", "line"),
    [
        (4, 5, 2, "n_group=5 is not supported .a divisor of 24"),
        (4, 24, 8, "n_group=24 is not supported"),
        (8, 6, 1, "topk_group=1 is not supported .as many groups as have 8 experts, 6 at most"),
        (8, 6, 7, "topk_group=7 is not supported"),
    ],
)
def test_groups_that_cannot_be(topk: int, groups: int, chosen: int, line: str) -> None:
    config = {"n_routed_experts": EXPERTS, "n_group": groups, "topk_group": chosen}
    with pytest.raises(UserError, match=line):
        sigmoid_router_args(config, topk)
