"""On a GPU: the kernel behind packed latent attention against fp32, forward and backward."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

HEADS, QUERY, VALUE = 4, 192, 128
BORDERS = [0, 700, 701, 2048]


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within segments, in the operands' dtype: [t, heads, VALUE]."""
    out = []
    for start, end in pairwise(BORDERS):
        parts = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*parts, is_causal=True)[0].transpose(0, 1))
    return torch.cat(out)


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What latent attention calls in both backends, values padded to the keys' size."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor(BORDERS, dtype=torch.int32, device=q.device)
    longest = max(end - start for start, end in pairwise(BORDERS))
    v = F.pad(v, (0, QUERY - VALUE))
    options = {"scale": QUERY**-0.5, "window_size": (-1, 0)}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    return out[..., :VALUE]  # type: ignore[index]


def test_gradients_are_those_of_fp32() -> None:
    torch.manual_seed(0)
    sizes = (QUERY, QUERY, VALUE)
    half = [
        torch.randn(BORDERS[-1], HEADS, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for d in sizes
    ]
    full = [x.detach().float().requires_grad_() for x in half]
    weight = torch.randn(BORDERS[-1], HEADS, VALUE, device="cuda")
    expected = reference(*full)
    found = varlen(*half)
    assert (found - expected).norm() <= 1e-2 * expected.norm()
    (expected * weight).sum().backward()
    (found.float() * weight).sum().backward()
    for one, other in zip(half, full, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).norm() <= 2e-2 * other.grad.norm()
