"""The head in blocks of tokens: losses, statistics and gradients of whole fp64 logits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmeg.models import head
from swiftmeg.models.kernels import weight_gradient

GROUP = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def layer(weight: Tensor, words: int) -> Any:
    return SimpleNamespace(
        weight=weight,
        tp_group=GROUP,
        sequence_parallel=False,
        vocab_size=words,
        accumulates=False,
        in_blocks=True,
    )


@pytest.fixture(params=[1 << 28, 64, 1], ids=["one block", "two rows", "a row"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("words", "rows"), [(29, 32), (32, 32)])
def test_losses_statistics_and_gradients(words: int, rows: int) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(5, 3, 8, requires_grad=True)
    weight = (2 * torch.randn(rows, 8)).requires_grad_()
    labels = torch.randint(words, (3, 5))
    factors = torch.randn(3, 5)
    seen = head.TokenStatistics()
    losses = head.token_losses(
        hidden_states=hidden,
        output_layer=layer(weight, words),
        output_weight=None,
        labels=labels,
        context=seen,
    )
    (losses * factors).sum().backward()

    x, w = (each.detach().double().requires_grad_() for each in (hidden, weight))
    logits = (x @ w.t())[..., :words].transpose(0, 1)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    (expected.view(3, 5) * factors).sum().backward()
    close(losses, expected.view(3, 5))
    close(hidden.grad, x.grad)
    close(weight.grad, w.grad)
    logs = logits.log_softmax(-1)
    close(seen.entropy, -(logs.exp() * logs).sum(-1))
    close(seen.mean_logit, logits.mean(-1))
    close(seen.log_collision, (2 * logs).exp().sum(-1).log())
    assert torch.equal(seen.is_likeliest, (logits.argmax(-1) == labels).float())


def test_gradients_are_added_to_the_buffer() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(4, 1, 8), torch.randn(32, 8)
    labels = torch.randint(32, (1, 4))
    plain = torch.nn.Parameter(weight.clone())
    buffered: Any = torch.nn.Parameter(weight.clone())
    buffered.main_grad = torch.ones(32, 8)
    buffered.grad_added_to_main_grad = False
    assert weight_gradient.has_buffer(buffered)
    for parameter in (plain, buffered):
        output = layer(parameter, 30)
        output.accumulates = True
        losses = head.token_losses(
            hidden_states=hidden, output_layer=output, output_weight=None, labels=labels % 30
        )
        losses.sum().backward()
    assert plain.grad.abs().max() > 0.1
    close(buffered.main_grad, plain.grad + 1)
    assert buffered.grad_added_to_main_grad


def close(one: Tensor | None, other: Tensor | None) -> None:
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.double(), other.double(), rtol=2e-5, atol=2e-5)
