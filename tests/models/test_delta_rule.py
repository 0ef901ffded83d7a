"""The chunked gated delta rule against the walk over tokens, and sequences beside each other."""

import pytest
import torch
from torch import Tensor

from swiftmeg.models.linear_attention import convolve
from swiftmeg.models.native.delta_rule import Chunks, gated_delta_rule

LENGTHS = [[1], [7], [63], [64], [65], [130, 1, 64, 7, 65, 193]]
GROUPS, HEADS, KEY, VALUE = 2, 3, 5, 4

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(tokens: int) -> Inputs:
    torch.manual_seed(tokens)
    query, key = torch.randn(2, tokens, GROUPS, KEY, dtype=torch.float64)
    value = torch.randn(tokens, GROUPS, HEADS, VALUE, dtype=torch.float64)
    log_decay, beta = torch.randn(2, tokens, GROUPS, HEADS, dtype=torch.float64)
    key = key / key.norm(dim=-1, keepdim=True)
    made = (query, key, value, -log_decay.square(), beta.sigmoid())
    return tuple(each.requires_grad_() for each in made)  # type: ignore[return-value]


def walk(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """One sequence, token by token."""
    state = value.new_zeros(GROUPS, HEADS, KEY, VALUE)
    outputs = []
    for q, k, v, decay, b in zip(query, key, value, log_decay.exp(), beta, strict=True):
        state = state * decay[..., None, None]
        wrong = v - torch.einsum("gk,ghkv->ghv", k, state)
        state = state + torch.einsum("gk,ghv->ghkv", k, b[..., None] * wrong)
        outputs.append(torch.einsum("gk,ghkv->ghv", q, state))
    return torch.stack(outputs)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunks_compute_what_the_walk_over_tokens_does(lengths: list[int]) -> None:
    made = inputs(sum(lengths))
    expected = torch.cat([walk(*parts) for parts in zip(*(x.split(lengths) for x in made))])
    weight = torch.randn_like(expected)
    found = gated_delta_rule(*made, Chunks(lengths, torch.device("cpu")))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad((found * weight).sum(), made)
    wanted = torch.autograd.grad((expected * weight).sum(), made)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_convolution_ends_where_sequences_do(lengths: list[int]) -> None:
    torch.manual_seed(0)
    tokens, kernel = torch.randn(sum(lengths), 3), torch.randn(3, 1, 4)
    found = convolve(tokens, kernel, lengths)
    for rows, expected in zip(found.split(lengths), tokens.split(lengths), strict=True):
        past = torch.nn.functional.pad(expected, (0, 0, 3, 0)).unfold(0, 4, 1)
        torch.testing.assert_close(rows, (past * kernel[:, 0]).sum(dim=-1))
