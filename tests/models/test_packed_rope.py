"""Rotary embeddings of a whole pack: what Megatron computes sample by sample."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from swiftmeg.models.rope import rotate_pack

LENGTHS = [1, 7, 12, 64, 3]
FORMS = [
    {},
    {"mscale": 1.3},
    {"rotary_interleaved": True},
    {"mla_rotary_interleaved": True, "mscale": 0.7},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_a_pack_is_rotated_as_its_samples_are(rank: int, size: int, form: dict[str, Any]) -> None:
    megatrons = rope_utils._apply_rotary_pos_emb_thd
    assert megatrons is not rotate_pack
    torch.manual_seed(2)
    lengths = torch.tensor([0, *(2 * size * length for length in LENGTHS)])
    borders = lengths.cumsum(0).to(torch.int32)
    half = torch.randn(int(lengths.max()), 1, 1, 3)
    interleaved = form.get("rotary_interleaved")
    angles = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], -1)
    group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
    results = []
    for apply in (megatrons, rotate_pack):
        torch.manual_seed(3)
        heads = torch.randn(int(borders[-1]) // size, 3, 10, requires_grad=True)
        turned = apply(heads, borders, angles, cp_group=group, **form)
        turned.square().mul(torch.arange(10.0)).sum().backward()
        results.append((turned, heads.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
