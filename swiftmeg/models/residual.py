"""The sum of a layer's output and the residual stream."""

from collections.abc import Callable

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor

Addition = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def add_residual(training: bool, fused: bool) -> Addition:
    """Return Megatron's function that adds bias, dropout and residual, without detours.

    Where there is neither bias nor dropout it is one addition, which needs no compiler.
    """
    other: Addition = get_bias_dropout_add(training, fused)

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        x, bias = x_with_bias
        if bias is None and not (training and prob) and x.dtype == residual.dtype:
            return residual + x
        return other(x_with_bias, residual, prob)

    return add
