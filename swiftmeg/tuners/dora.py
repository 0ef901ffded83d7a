"""DoRA (arXiv:2402.09353): the rows of weight and adapter together get lengths that are trained.

A layer computes `magnitude / norm * (W + scale * B @ A) x`, norm being that of each row of the sum.
As in PEFT the norm takes no gradient, and dropout falls on the input of all that is not `W x`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    # Rows of padding are 0; so are their magnitudes.
    return (squares + added).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
