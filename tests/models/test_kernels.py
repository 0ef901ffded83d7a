"""Kernels against fp64: on GPUs themselves, on CPUs the plain torch forms that stand for them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmeg.models.kernels import qkv, rope, swiglu
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "width"),
    [(qkv.Heads(1, 1, 4), 4), (qkv.Heads(2, 3, 10), 6), (qkv.Heads(3, 2, 128), 128)],
)
def test_heads_are_split_normed_and_rotated(
    device: str, offset: float | None, interleaved: bool, heads: qkv.Heads, width: int
) -> None:
    torch.manual_seed(1)
    size = heads.size
    start = torch.randn(9, heads.groups * (heads.queries + 2) * size, device=device)
    positions = torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 5], device=device)
    angles = torch.randn(6, width // 2, device=device)
    weights = torch.rand(2, size, device=device) + 0.5
    counts = (heads.groups * heads.queries, heads.groups, heads.groups)
    into = [torch.randn(9, count, size, device=device) for count in counts]
    results = []
    for dtype in (torch.float, torch.double):
        x = start.detach().to(dtype, copy=True).requires_grad_()
        w = weights.detach().to(dtype, copy=True).requires_grad_()
        if dtype is torch.float:
            rotation = qkv.Rotation(positions, angles.cos(), angles.sin(), interleaved)
            norm = None if offset is None else qkv.HeadNorm(w[0], w[1], 1e-3, offset)
            parts = qkv.split_and_rotate(x, heads, rotation, norm)
        else:
            groups = x.view(9, heads.groups, -1, size)
            query, key = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2]
            if offset is not None:
                query = F.rms_norm(query, (size,), w[0] + offset, 1e-3)
                key = F.rms_norm(key, (size,), w[1] + offset, 1e-3)
            turn = angles[positions].double()
            rotated = [by_complex_numbers(y, turn, interleaved, interleaved) for y in (query, key)]
            parts = (*rotated, groups[:, :, -1])
        sum((part * grad).sum() for part, grad in zip(parts, into, strict=True)).backward()
        results.append((*parts, x.grad, *([] if offset is None else [w.grad])))
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
