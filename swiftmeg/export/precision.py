"""--test_convert_precision: do both models compute the same logits?"""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor

from swiftmeg.errors import UserError
from swiftmeg.models.family import Row

RELATIVE_BOUND = 1e-3
"""Largest difference of two logits, as a share of the largest logit. fp32 rounding over deep models
stays one to two orders below; a wrong weight is orders above."""

_SAMPLE = [
    {"role": "user", "content": "Which weights belong together?"},
    {
        "role": "assistant",
        "content": "Those of one layer: queries, keys and values; then gate and up projections.",
    },
]


def sample_ids(tokenizer: Any) -> Tensor:
    """Token ids [1, s] of a short conversation, in the model's own chat format if it has one."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(_SAMPLE, tokenize=False)
    else:
        text = "\n".join(turn["content"] for turn in _SAMPLE)
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return torch.tensor([ids])


def _forward_step(ids: Tensor, iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return model(ids, positions, None), lambda output, non_loss_data=True: output


@torch.no_grad()
def mcore_logits(models: list[Any], ids: Tensor, vocab_size: int) -> Tensor | None:
    """fp32 logits [1, s, vocab_size] of a live model on the last pipeline stage, else None.

    Weights go to fp32 and back to their own dtype, which loses nothing. Collective.
    """
    chunks = unwrap_model(models)
    dtype = chunks[0].config.params_dtype
    configs = {
        id(module.config): module.config
        for chunk in chunks
        for module in chunk.modules()
        if hasattr(module, "config")
    }

    def cast(to: torch.dtype) -> None:
        for chunk in chunks:
            chunk.to(to).eval()
        for config in configs.values():
            config.pipeline_dtype = config.params_dtype = to

    cast(torch.float32)
    try:
        outputs = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, ids),
            data_iterator=[iter(()) for _ in chunks] if len(chunks) > 1 else iter(()),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=1,
            seq_length=ids.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        cast(dtype)
    if not mpu.is_pipeline_last_stage():
        return None
    return gather_from_tensor_model_parallel_region(outputs[0])[..., :vocab_size]


@torch.no_grad()
def hf_logits(
    folder: Path,
    ids: Tensor,
    hf_config: Any = None,
    dtype: torch.dtype = torch.float32,
    kept: Collection[str] = (),
) -> Tensor:
    """fp32 logits [1, s, vocab_size] of the model in an HF folder, with its own config or this.

    Its weights are rounded to `dtype` first, but for those in `kept`, the last two parts of names.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(folder, config=hf_config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if _ending(name) not in kept:
            parameter.copy_(parameter.to(dtype))
    model.to(ids.device)
    logits: Tensor = model.eval()(ids).logits
    return logits.float()


def _ending(name: str) -> str:
    """What transformers leaves of a name from a file when it loads it: module and tensor."""
    return ".".join(name.split(".")[-2:])


def compare_logits(
    models: list[Any],
    folder: Path,
    tokenizer: Any,
    vocab_size: int,
    plan: Iterable[Row],
    hf_config: Any = None,
) -> None:
    """Compare a live model with an HF folder and print the differences; collective.

    The folder's weights are rounded as those of the live model are, but for the rows of `plan` that
    stay fp32. `hf_config` takes the place of the folder's config.json.

    UserError, on every rank, where the largest difference is above the bound.
    """
    ids = sample_ids(tokenizer).to(torch.cuda.current_device())
    dtype = unwrap_model(models)[0].config.params_dtype
    kept = {_ending(name) for row in plan if row.fp32 for name in row.hf}
    judge(
        mcore_logits(models, ids, vocab_size),
        lambda: hf_logits(folder, ids, hf_config, dtype, kept),
        f"{folder} and the Megatron model",
    )


def judge(
    ours: Tensor | None,
    reference: Callable[[], Tensor],
    compared: str,
    allowed: float = RELATIVE_BOUND,
) -> None:
    """Compare logits [1, s, vocab_size], which the last rank knows, with others; collective.

    `compared` names both models, `allowed` is the largest difference as a share of the largest
    logit. UserError, on every rank, where a difference is above that.
    """
    verdict: list[str | None] = [None]
    last = torch.distributed.get_world_size() - 1  # on the last stage in every order of groups
    if torch.distributed.get_rank() == last:
        assert ours is not None
        theirs = reference()
        difference = (ours - theirs).abs()
        bound = allowed * theirs.abs().max().item()
        agree = (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        mean, largest = difference.mean().item(), difference.max().item()
        print(
            f"mean_diff: {mean:.3e}, max_diff: {largest:.3e} (allowed: {bound:.3e}), "
            f"next token agrees at {agree} of {ours.shape[1]} places",
            flush=True,
        )
        if not largest <= bound:
            verdict[0] = (
                f"--test_convert_precision: the logits of {compared} differ by up to "
                f"{largest:.3e}, allowed are {bound:.3e}: the conversion is wrong"
            )
    torch.distributed.broadcast_object_list(verdict, src=last)
    if verdict[0]:
        raise UserError(verdict[0])
