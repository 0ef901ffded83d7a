"""The native experts: one product for all, or one after the other."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from swiftmeg.models.native import experts
from swiftmeg.models.native.experts import grouped_product

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
        out = experts._GroupedProduct.apply(x, ends, *weights)
    else:
        out = grouped_product(x, weights, ROWS, fuse=True)
    assert torch.allclose(out, one_by_one(x, weights), atol=1e-6)
    found = torch.autograd.grad(out.square().sum(), [x, *weights])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


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
