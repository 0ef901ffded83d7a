"""The native experts: one product for all, or one after the other."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swiftmeg.models.native import experts
from swiftmeg.models.native.experts import grouped_product
from tests.matrix.cases import Row, write_inputs
from tests.matrix.harness import check_trained, run

ROWS = [3, 0, 5, 1]


def operands() -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    x = torch.randn(sum(ROWS), 8, requires_grad=True)
    return x, [torch.randn(6, 8, requires_grad=True) for _ in ROWS]


def one_by_one(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Row by row, with the weight of the row's expert."""
    owner = [expert for expert, count in enumerate(ROWS) for _ in range(count)]
    return torch.stack([weights[expert] @ row for expert, row in zip(owner, x, strict=True)])


def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """torch's grouped product as documented, for machines without its kernel."""
    spans = [slice(*pair) for pair in pairwise([0, *offs.tolist()])]
    if b.dim() == 2:
        return torch.stack([a[:, span] @ b[span] for span in spans])
    return torch.cat([a[span] @ matrix for span, matrix in zip(spans, b, strict=True)])


@pytest.mark.parametrize("kernel", [False, True])
def test_every_row_meets_its_expert(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = operands()
    loss = one_by_one(x, weights).square().sum()
    expected = torch.autograd.grad(loss, [x, *weights], materialize_grads=True)
    if kernel:
        monkeypatch.setattr(experts, "_grouped_mm", grouped_mm)
        ends = torch.tensor(ROWS).cumsum(0)
        out = experts._GroupedProduct.apply(x, ends, False, *weights)
    else:
        out = grouped_product(x, weights, ROWS, fuse=True)
    assert torch.allclose(out, one_by_one(x, weights), atol=1e-6)
    found = torch.autograd.grad(out.square().sum(), [x, *weights])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("in_order", [False, True])
def test_gradients_are_added_to_the_buffers(
    in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_grouped_mm", grouped_mm)
    monkeypatch.setattr(experts, "_has_kernel", lambda x, weight: True)
    x, weights = operands()
    values = torch.stack([weight.detach() for weight in weights])
    buffer = torch.full_like(values, 2.0)
    order = range(len(ROWS)) if in_order else reversed(range(len(ROWS)))
    for weight, place in zip(weights, order, strict=True):
        weight.data = values[place].copy_(weight.data.clone())
        weight.main_grad = buffer[place]  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    assert (experts.side_by_side(weights) is not None) == in_order
    loss = one_by_one(x, weights).square().sum()
    expected = torch.autograd.grad(loss, [x, *weights], materialize_grads=True)
    out = grouped_product(x, weights, ROWS, fuse=True, accumulate=True)
    out.square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, expected[0], atol=1e-5)
    for weight, gradient in zip(weights, expected[1:], strict=True):
        assert torch.allclose(weight.main_grad, gradient + 2.0, atol=1e-5)  # type: ignore[attr-defined]
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def with_kernel() -> None:
    """Take torch's grouped product on CPUs too; weights and buffers must lie in order."""
    experts._has_kernel = lambda x, weight: True  # type: ignore[assignment]
    view = experts.side_by_side

    def in_order(tensors: Sequence[Tensor]) -> Tensor:
        together = view(tensors)
        assert together is not None
        return together

    experts.side_by_side = in_order


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares processes without GPUs")
def test_a_job_with_the_kernel_computes_what_the_loop_does(tmp_path: Path) -> None:
    write_inputs(tmp_path, {"moe"})
    row = Row("moe", "ep2 dp2", "packed", 2)
    expected = run(tmp_path, row, "loop", torch_dtype="bfloat16")
    found = run(tmp_path, row, "kernel", mutate=with_kernel, torch_dtype="bfloat16")
    assert check_trained(expected) == []
    assert found["gradients"].keys() == expected["gradients"].keys()
    for key, gradient in expected["gradients"].items():
        assert torch.equal(found["gradients"][key], gradient), key
    for one, other in zip(found["lines"], expected["lines"], strict=True):
        assert one["lm loss"] == other["lm loss"]


def test_only_neighbours_in_one_storage_are_taken_together() -> None:
    whole = torch.arange(24.0).view(4, 2, 3)
    together = experts.side_by_side(list(whole[1:]))
    assert together is not None
    assert torch.equal(together, whole[1:])
    assert experts.side_by_side([whole[0], whole[2]]) is None
    assert experts.side_by_side([whole[1], whole[0]]) is None
    assert experts.side_by_side([whole[0].t(), whole[1].t()]) is None
    assert experts.side_by_side([torch.zeros(2), torch.zeros(2)]) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernel_computes_what_the_loop_does() -> None:
    torch.manual_seed(3)
    rows = [130, 0, 77, 1]
    x = torch.randn(sum(rows), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = [
        torch.randn(48, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in rows
    ]
    results = []
    for fuse in (True, False):
        out = grouped_product(x, weights, rows, fuse=fuse)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *weights])])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()
