"""The optimizer's parameter groups beside Megatron's own."""

from typing import Any

import torch
from megatron.core.optimizer.optimizer_config import (
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
)

from swiftmeg.tuners.loraplus import learning_rates


def parameter_groups(config: OptimizerConfig, lorap_lr_ratio: float | None) -> dict[ParamKey, Any]:
    """Megatron's overrides: the rates of LoRA+, and fp32 parameters of half-precision models apart.

    Megatron's distributed optimizer puts a group's fp32 parameters before the others, and looks for
    each where it was before: a checkpoint cannot be saved of a group that has both.
    """
    groups = learning_rates(config, lorap_lr_ratio)
    if config.bf16 or config.fp16:
        exact = ParamPredicate(name="fp32", fn=lambda parameter: parameter.dtype == torch.float32)
        groups[ParamKey(predicate=exact)] = {"dtype": "fp32"}
    return groups
