"""Kernels in Triton for GPUs, each beside the same function in plain torch."""

import importlib.util
from functools import cache

from torch import Tensor


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(x: Tensor) -> bool:
    """Whether kernels in Triton can run on `x`: it lies on a GPU, and Triton is installed."""
    return x.is_cuda and _has_triton()
