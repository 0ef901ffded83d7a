"""How layers are split over pipeline stages, and what cannot be split."""

import re
from typing import Any

from swiftmeg.errors import UserError

_SPLITS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)


def layout_stages(layout: str) -> list[str]:
    """The stages of a layout such as `Et*3|(tt|)*6L`, multiplications written out.

    Letters: E embedding, t decoder layer, m layer of multi-token prediction, L loss.
    """
    text = re.sub(r"[,\s]", "", layout)
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([^()*])\*(\d+)"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    return text.split("|")


def check_pipeline(args: Any, layers: int) -> None:
    """UserError unless `layers` can be split as the arguments say; they may lack some flags."""
    pp = args.pipeline_model_parallel_size
    given = {name: getattr(args, name, None) for name in _SPLITS}
    given = {name: value for name, value in given.items() if value}
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    for name in given if pp == 1 else ():
        if given[name] != 1 or not name.startswith("virtual"):
            raise UserError(
                f"--{name} needs --pipeline_model_parallel_size above 1: raise it or drop the flag"
            )
    if layout is not None:
        _check_written_layout(layout, layers, pp, given)
        return
    first, last = (given.get(name) for name in _SPLITS[:2])
    extra = sum(bool(given.get(name)) for name in _SPLITS[2:4])
    if extra and (first or last):
        raise UserError(
            "--account_for_embedding/loss_in_pipeline_split and "
            "--decoder_first/last_pipeline_num_layers are two ways to split: drop one"
        )
    stages = pp - bool(first) - bool(last)
    middle = layers + extra - (first or 0) - (last or 0)
    if middle < stages or (stages and middle % stages) or (not stages and middle):
        raise UserError(
            f"{layers} layers cannot be split over --pipeline_model_parallel_size {pp}: "
            "use a divisor, set --decoder_first_pipeline_num_layers and "
            "--decoder_last_pipeline_num_layers so that the rest divides, or write a "
            "--pipeline_model_parallel_layout"
        )
    per_stage = [size for size in (first, last, middle // stages if stages else None) if size]
    _check_parts(given, per_stage)


def _check_parts(given: dict[str, Any], per_stage: list[int]) -> None:
    """UserError unless the layers of every stage can be split into model parts."""
    parts = given.get("virtual_pipeline_model_parallel_size")
    size = given.get("num_layers_per_virtual_pipeline_stage")
    if parts and size:
        raise UserError(
            "--virtual_pipeline_model_parallel_size and --num_layers_per_virtual_pipeline_stage "
            "say the same: drop one"
        )
    for layers in per_stage:
        if layers % (parts or size or 1):
            name, value = (
                ("virtual_pipeline_model_parallel_size", parts)
                if parts
                else ("num_layers_per_virtual_pipeline_stage", size)
            )
            raise UserError(
                f"--{name} {value} does not divide the {layers} layers of a pipeline stage: use a "
                "divisor, or write a --pipeline_model_parallel_layout"
            )


def _check_written_layout(layout: str, layers: int, pp: int, given: dict[str, Any]) -> None:
    flag = f"--pipeline_model_parallel_layout {layout!r}"
    if given:
        raise UserError(f"{flag} says the whole split: drop --{next(iter(given))}")
    stages = layout_stages(layout)
    letters = "".join(stages)
    if not re.fullmatch(r"Et*m*L", letters):
        raise UserError(f"{flag}: must be E, one t a decoder layer, and L, with | between stages")
    if letters.count("t") != layers:
        raise UserError(f"{flag} has {letters.count('t')} layers, the model has {layers}")
    if len(stages) % pp:
        raise UserError(
            f"{flag} has {len(stages)} stages, which --pipeline_model_parallel_size {pp} does not "
            "divide: change one"
        )


def virtual_stages(args: Any, layers: int) -> int:
    """Model parts on each pipeline stage."""
    pp = args.pipeline_model_parallel_size
    if args.pipeline_model_parallel_layout is not None:
        return len(layout_stages(args.pipeline_model_parallel_layout)) // pp
    if size := args.num_layers_per_virtual_pipeline_stage:
        extra = args.account_for_embedding_in_pipeline_split
        return int((layers + extra + args.account_for_loss_in_pipeline_split) // pp // size)
    return args.virtual_pipeline_model_parallel_size or 1


def check_interleaving(args: Any, layers: int, data_parallel_size: int) -> None:
    """UserError unless the micro-batches fill rounds over all stages, as model parts need."""
    pp = args.pipeline_model_parallel_size
    if virtual_stages(args, layers) == 1:
        return
    batches = args.global_batch_size // (args.micro_batch_size * data_parallel_size)
    if batches % pp:
        raise UserError(
            f"--global_batch_size {args.global_batch_size} makes {batches} micro-batches a step; "
            f"virtual pipeline stages need a multiple of --pipeline_model_parallel_size {pp}: "
            "change the batch sizes"
        )
