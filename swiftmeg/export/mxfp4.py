"""MXFP4 weights as gpt-oss publishes them: two 4-bit numbers a byte, one scale for each 32.

An expert's matrix [rows, columns] comes as `_blocks` [rows, columns / 32, 16] and `_scales`
[rows, columns / 32], exponents of two with a bias of 127 (OCP microscaling formats, version 1.0).
"""

import torch
from torch import Tensor

from swiftmeg.models.family import HFConfig

BLOCKS, SCALES = "_blocks", "_scales"
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_HALF, *(-value for value in _HALF)])


def is_mxfp4(config: HFConfig) -> bool:
    """Whether config.json says that experts are stored so."""
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def check_scales(blocks: Tensor, scales: Tensor) -> None:
    """ValueError unless there is one scale for each block of a matrix of each expert."""
    if scales.dim() != 3 or blocks.shape != (*scales.shape, 16):
        raise ValueError(f"blocks {tuple(blocks.shape)} with scales {tuple(scales.shape)}")


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """The matrix [rows, columns] of one expert in bf16, which holds it exactly."""
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    numbers = torch.ldexp(_VALUES[pairs.int()], scales[..., None].int() - 127)
    return numbers.flatten(-2).to(torch.bfloat16)
