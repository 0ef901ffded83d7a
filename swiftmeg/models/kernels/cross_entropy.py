"""Statistics of a softmax over a part of the vocabulary, and its gradient, for blocks of logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from swiftmeg.models.kernels import use_triton


class RowSums(NamedTuple):
    """What is known of each row of logits x [t, v]: fp32 [t] each."""

    largest: Tensor
    total: Tensor
    """sum exp(x - largest)"""
    squares: Tensor
    """sum exp(2 (x - largest))"""
    weighted: Tensor
    """sum exp(x - largest) * x"""
    plain: Tensor
    """sum x"""
    target: Tensor
    """The label's logit; 0 where the label is not among these columns."""


def row_sums(logits: Tensor, labels: Tensor, limit: int) -> RowSums:
    """Sum over the first `limit` columns of `logits` [t, v].

    `labels` [t] are columns; negative or beyond `limit`: the label is elsewhere.
    """
    if use_triton(logits):
        from swiftmeg.models.kernels import triton_cross_entropy

        return RowSums(*triton_cross_entropy.row_sums(logits, labels, limit))
    if limit == 0:
        nothing = logits.new_zeros(len(logits), dtype=torch.float32)
        return RowSums(nothing - torch.inf, *[nothing] * 5)
    x = logits[:, :limit].float()
    largest = x.amax(dim=1)
    shares = (x - largest[:, None]).exp()
    here = (labels >= 0) & (labels < limit)
    target = x.gather(1, labels.clamp(0, limit - 1)[:, None])[:, 0] * here
    squares, weighted = (shares * shares).sum(1), (shares * x).sum(1)
    return RowSums(largest, shares.sum(1), squares, weighted, x.sum(1), target)


def gradient_(logits: Tensor, labels: Tensor, log_total: Tensor, grad: Tensor, limit: int) -> None:
    """Overwrite `logits` [t, v] by the gradient of the cross entropy times `grad` [t].

    `log_total` [t] is the logarithm of the sum of exponentials over the whole vocabulary; columns
    from `limit` on get 0. `labels` as in `row_sums`.
    """
    if use_triton(logits):
        from swiftmeg.models.kernels import triton_cross_entropy

        triton_cross_entropy.gradient_(logits, labels, log_total, grad, limit)
        return
    shares = (logits[:, :limit].float() - log_total[:, None]).exp()
    here = (labels >= 0) & (labels < limit)
    shares[here.nonzero()[:, 0], labels[here]] -= 1
    logits[:, :limit] = (shares * grad[:, None]).to(logits.dtype)
    logits[:, limit:] = 0
