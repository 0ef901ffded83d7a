"""Block-quantised fp8 weights as DeepSeek-V3 publishes them: one fp32 scale a block of each matrix.

A tensor `x.weight` in float8_e4m3fn comes with `x.weight_scale_inv` of shape
[ceil(rows / block), ceil(columns / block)]; the weight is the product of the two.
"""

import torch
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.export.blocks import Block
from swiftmeg.models.family import HFConfig

SCALE = "_scale_inv"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def block_size(config: HFConfig) -> tuple[int, int] | None:
    """Rows and columns of a block, or None for weights that are not quantised.

    UserError for other ways of quantising.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or block is None:
        raise UserError(
            f"config.json: quantization_config with quant_method={method!r} and "
            f"weight_block_size={block} is not supported (fp8 with a weight_block_size is): "
            "use the model's bf16 weights"
        )
    return int(block[0]), int(block[1])


def check_scales(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """ValueError unless there is one scale for each block of `weight` [rows, columns]."""
    wanted = tuple(-(-size // length) for size, length in zip(weight.shape, block, strict=True))
    if tuple(scale.shape) != wanted:
        raise ValueError(f"scales {tuple(scale.shape)} for blocks {wanted}")


def surrounding(part: Block, shape: torch.Size, block: tuple[int, int]) -> tuple[Block, Block]:
    """Which rows and columns hold all of `part` in whole blocks, and the scales of these blocks."""
    axes = list(zip(part, shape, block, strict=True))
    scales = tuple(slice(p.start // length, -(-p.stop // length)) for p, _, length in axes)
    around = (
        slice(s.start * length, min(s.stop * length, size))
        for s, (_, size, length) in zip(scales, axes, strict=True)
    )
    return tuple(around), scales


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """`weight` [rows, columns] times its blocks' scales, in fp32; ValueError if they do not fit."""
    check_scales(weight, scale, block)
    columns = weight.shape[1]
    result = weight.to(torch.float32)
    for row in range(scale.shape[0]):
        band = result[row * block[0] : (row + 1) * block[0]]
        band *= scale[row].float().repeat_interleave(block[1])[:columns]
    return result
