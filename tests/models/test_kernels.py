"""Kernels' plain torch forms, which stand for them on CPUs, against fp64; and on GPUs the kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmeg.models.kernels import rope, swiglu
from swiftmeg.models.kernels.weight_gradient import add_product
from swiftmeg.models.native.mlp import _SwiGLUProduct

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ),
]


def close(one: Tensor | None, other: Tensor | None) -> None:
    assert one is not None
    assert other is not None
    assert other.abs().max() > 0.01
    torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (7, 2050)])
def test_swiglu(device: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape, device=device, requires_grad=True)
    w = x.detach().double().requires_grad_()
    gate, up = w.chunk(2, -1)
    into = torch.randn(*shape[:-1], shape[-1] // 2, device=device)
    for out in (swiglu.swiglu(x), (F.silu(gate) * up)):
        (out * into).sum().backward()
    close(swiglu.swiglu(x), F.silu(gate) * up)
    close(x.grad, w.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_the_product_behind_swiglu(device: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 1, 14, device=device, requires_grad=True)
    weight = torch.randn(6, 7, device=device, requires_grad=True)
    into = torch.randn(5, 1, 6, device=device)
    (_SwiGLUProduct.apply(x, weight, False) * into).sum().backward()
    y, v = (each.detach().double().requires_grad_() for each in (x, weight))
    gate, up = y.chunk(2, -1)
    ((F.silu(gate) * up @ v.t()) * into).sum().backward()
    close(x.grad, y.grad)
    close(weight.grad, v.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("orders", [(False, False), (True, True), (True, False)], ids=str)
@pytest.mark.parametrize(("heads", "size", "width"), [(1, 4, 4), (3, 10, 6), (12, 128, 128)])
def test_rotation(
    device: str, orders: tuple[bool, bool], heads: int, size: int, width: int
) -> None:
    torch.manual_seed(1)
    both = torch.randn(9, heads + 1, size, device=device, dtype=torch.double, requires_grad=True)
    positions = torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 5], device=device)
    angles = torch.randn(6, width // 2, device=device)
    into = torch.randn(9, heads, size, device=device)
    results = []
    for x in (both.detach().float().requires_grad_(), both):
        view = x[:, 1:]  # heads of a larger tensor, as those of queries are
        if x.dtype == torch.float:
            out = rope.rotate(
                view,
                positions,
                angles.cos(),
                angles.sin(),
                reads_pairs=orders[0],
                writes_pairs=orders[1],
            )
        else:
            out = by_complex_numbers(view, angles[positions].double(), *orders)
        (out * into).sum().backward()
        results.append((out, x.grad))
    for one, other in zip(*results, strict=True):
        close(one, other)


def by_complex_numbers(x: Tensor, angles: Tensor, reads: bool, writes: bool) -> Tensor:
    half = angles.shape[1]
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = head.unflatten(-1, (half, 2) if reads else (2, half))
    one, two = pairs.unbind(-1 if reads else -2)
    turned = torch.complex(one, two) * torch.polar(torch.ones_like(angles), angles)[:, None]
    axis = -1 if writes else -2
    return torch.cat([torch.stack([turned.real, turned.imag], axis).flatten(-2), rest], -1)


@pytest.mark.parametrize("device", DEVICES)
def test_products_are_added(device: str) -> None:
    torch.manual_seed(1)
    grad, x = torch.randn(9, 8, device=device), torch.randn(9, 16, device=device)
    buffer = torch.ones(8, 16, device=device)
    add_product(buffer, grad, x)
    close(buffer, 1 + grad.double().t() @ x.double())
    half = torch.ones(8, 16, device=device)
    add_product(half, grad.bfloat16(), x.bfloat16())
    close(half, 1 + grad.bfloat16().double().t() @ x.bfloat16().double())
