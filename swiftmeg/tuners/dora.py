"""DoRA (arXiv:2402.09353): the rows of weight and adapter together get lengths that are trained.

A layer computes `magnitude / norm * (W + scale * B @ A) x`, norm being that of each row of the sum.
As in PEFT the norm takes no gradient, and dropout falls on the input of all that is not `W x`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = torch.finfo(torch.float32).tiny ** 0.5
"""The norm that a row of padding is given."""


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, group: Any = None) -> Tensor:
    """fp32 norms [out] of the rows of weight [out, in] + scale * b [out, rank] @ a [rank, in].

    The sum itself is never made: the square of a row is w w + 2 scale b (a w) + scale^2 b (a a) b.
    `group` are the ranks that hold other columns, if any; collective for them.
    """
    a, b = a.float(), b.float()
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    crossed = F.linear(weight, a.to(weight.dtype)).float()  # [out, rank]
    gram = a @ a.t()
    if group is not None and group.size() > 1:
        sizes = [part.numel() for part in (squares, crossed, gram)]
        sums = torch.cat([part.flatten() for part in (squares, crossed, gram)])
        torch.distributed.all_reduce(sums, group=group)
        squares, flat, square = sums.split(sizes)
        crossed, gram = flat.view_as(crossed), square.view_as(gram)
    added = 2 * scale * (b * crossed).sum(1) + scale**2 * (b @ gram * b).sum(1)
    return (squares + added).clamp_min(0).sqrt().clamp_min(SHORTEST)


def row_factors(magnitude: Tensor, norms: Tensor) -> Tensor:
    """magnitude / norms [out], by which DoRA multiplies the rows of the sum; 1 for padding.

    The output of a row of padding stays as it is: it is the mask of a word that is not there.
    """
    return torch.where(norms > SHORTEST, magnitude / norms, 1)
