"""What a run does otherwise than the one that it continues."""

import dataclasses
from typing import Any

from swiftmeg import distributed
from swiftmeg.args.megatron import LearningRateArguments
from swiftmeg.args.model import DataArguments, TemplateArguments
from swiftmeg.args.resolve import read_args_file
from swiftmeg.args.tuner import FreezingArguments
from swiftmeg.errors import typed

_WITHOUT_EFFECT = (
    *("dataset_num_proc", "load_data_args", "use_hf", "hub_token"),
    *("load_from_cache_file", "download_mode"),
)
"""Flags of data that do not change the rows."""

_TRAINING = ("micro_batch_size", "global_batch_size", "seed", "optimizer", "fp16", "bf16")


def tell_changes(args: Any, megatron: Any, saved: Any) -> None:
    """Print, on the first rank, a line for each flag that is not as in the run that is continued.

    `args` are the run's own flags, `megatron` Megatron's namespace, `saved` that in the checkpoint.
    """
    if megatron.finetune or not distributed.on_rank_zero():
        return
    rows = changes(args, megatron, saved)
    if rows:
        print(f"not as in the run that --{args.continued} continues:")
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"  {name:<{width}}  {text}", flush=True)


def changes(args: Any, megatron: Any, saved: Any) -> list[tuple[str, str]]:
    """Name and text for each flag whose value differs; arguments as for `tell_changes`."""
    before = read_args_file(getattr(args, args.continued))
    pairs = {
        name: (getattr(args, name), before[name])
        for name in _names(TemplateArguments, DataArguments, FreezingArguments)
        if name in before and name not in _WITHOUT_EFFECT
    }
    for name in (*_names(LearningRateArguments), *_TRAINING):
        if hasattr(saved, name) and name != "lr_decay_iters":
            pairs[name] = getattr(megatron, name), getattr(saved, name)
    rows = [
        (name, f"{typed(now)}, was {typed(then)}")
        for name, (now, then) in pairs.items()
        if now != then
    ]
    now, then = _decay(megatron), _decay(saved)
    if now != then and megatron.lr_decay_style != "constant":
        kind = "stretched" if now > then else "shortened"
        text = f"{now}, was {then}: the schedule of the learning rate is {kind}"
        rows.append(("lr_decay_iters", text))
    return rows


def _decay(namespace: Any) -> int:
    """Steps over which the learning rate decays."""
    return int(namespace.lr_decay_iters or namespace.train_iters)


def _names(*groups: type[Any]) -> list[str]:
    return [each.name for group in groups for each in dataclasses.fields(group)]
