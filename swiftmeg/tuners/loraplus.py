"""LoRA+ (arXiv:2402.12354): B learns at a multiple of A's rate, in parameter groups of Megatron."""

from typing import Any

from megatron.core.optimizer.optimizer_config import (
    OptimizerConfig,
    ParamKey,
    ParamWithNamePredicate,
)
from torch import Tensor

EMBEDDING_RATE = 1e-6
"""Peak learning rate of an embedding's adapter, the default of PEFT's create_loraplus_optimizer."""


def learning_rates(config: OptimizerConfig, ratio: float | None) -> dict[ParamKey, Any]:
    """Megatron's overrides for B and for embeddings' adapters; none without a ratio.

    The groups are those of PEFT's create_loraplus_optimizer: every other vector that is trained
    goes with B, every other matrix with A. All of them follow the one schedule, in proportion.
    """
    if ratio is None:
        return {}
    peak = config.lr or 0.0
    floor = (config.min_lr or 0.0) / peak if peak else 0.0
    return {
        ParamKey(with_name_predicate=ParamWithNamePredicate(name=each.__name__, fn=each)): {
            "max_lr": rate,
            "min_lr": rate * floor,
        }
        for each, rate in ((_is_b, peak * ratio), (_is_of_embedding, EMBEDDING_RATE))
    }


def _is_of_embedding(parameter: Tensor, name: str) -> bool:
    return ".word_embeddings.lora_" in name


def _is_b(parameter: Tensor, name: str) -> bool:
    if _is_of_embedding(parameter, name):
        return False
    return ".lora_B." in name or parameter.dim() == 1
