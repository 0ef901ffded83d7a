"""Flags of features that are not there yet, and of the original's that have no meaning here.

Users' scripts state them, often at the value that switches the feature off: that passes. Any other
value ends the command with the feature's name or, where there is one, what to use instead.
"""

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any, Literal

from swiftmeg.errors import UserError, typed

logger = logging.getLogger(__name__)


class PlannedFlags:
    """Marks dataclasses of such flags; the first line of the docstring names the feature."""


@dataclass
class PlannedDataArguments(PlannedFlags):
    """Further data options"""

    packing_cache: str | None = None
    """Folder of packed rows."""
    cached_dataset: list[str] = field(default_factory=list)
    """Folders of tokenised rows."""
    mlp_padding_free: bool = False
    """Leave padding out of the MLP only."""
    remove_unused_columns: bool = True
    """Leave unknown columns of rows behind."""
    padding_side: Literal["right", "left"] = "right"
    """Where rows are padded."""
    template_backend: Literal["swift", "jinja"] | None = None
    """Who renders the chat template."""
    response_prefix: str | None = None
    """Text that every answer starts with; for `swift infer`."""


@dataclass
class PlannedModelArguments(PlannedFlags):
    """Further model options"""

    model_type: str | None = None
    """Name of the model's family."""
    task_type: Literal["causal_lm", "seq_cls", "embedding", "reranker", "generative_reranker"] = (
        "causal_lm"
    )
    """What the model's head computes."""
    num_labels: int | None = None
    """Labels of a classifier."""
    problem_type: str | None = None
    """Kind of classification."""
    attn_impl: str | None = None
    """Attention of transformers."""
    device_map: str | None = None
    """Placement of the Hugging Face model."""
    max_memory: str | None = None
    """Memory limits of the Hugging Face model."""
    local_repo_path: str | None = None
    """Source code of the model."""
    init_strategy: str | None = None
    """How weights that the folder lacks are made."""
    apply_query_key_layer_scaling: bool | None = None
    """Divide attention scores by the layer's number before the softmax and multiply after."""


@dataclass
class PlannedArguments(
    PlannedDataArguments,
    PlannedModelArguments,
):
    """Every planned flag of the training commands."""


OFF: dict[str, tuple[Any, ...]] = {
    "template_backend": ("swift",),
    "apply_query_key_layer_scaling": (False,),
}
"""Values that mean "off" beside the default."""

NOTED = {
    "packing_cache": "packing needs no folder of its own: tokenised rows are kept in "
    "$SWIFTMEG_CACHE",
    "padding_side": "rows are padded on the right, where no token attends to it: no loss differs",
    "response_prefix": "training does not use it: give it to swift infer",
}
"""Flags that are taken at any value, because no result depends on them, and what is said."""

REASONS = {
    "cached_dataset": "tokenised rows are kept in $SWIFTMEG_CACHE: name the rows by --dataset",
    "mlp_padding_free": "use --padding_free true, which leaves padding out everywhere",
    "remove_unused_columns": "rows hold the known columns only: drop it",
    "template_backend": "chat templates are jinja in any case: drop it",
    "model_type": "the family is found by config.json's `architectures`: drop it",
    "task_type": "only causal_lm is supported yet",
    "num_labels": "classifiers are not supported yet",
    "problem_type": "classifiers are not supported yet",
    "attn_impl": "it is a flag of swift infer; in training --attention_backend chooses kernels",
    "device_map": "it is a flag of swift infer; here the parallel sizes place the weights",
    "max_memory": "the parallel sizes place the weights: drop it",
    "local_repo_path": "models come from --model alone: drop it",
    "init_strategy": "every weight must be in the folder: drop it",
    "apply_query_key_layer_scaling": "it changes no result, and the attention kernels keep their "
    "scores in fp32: drop it",
}
"""What a refusal says instead of naming the group's feature."""


def planned_flags(cls: type[Any]) -> dict[str, type[Any]]:
    """The planned fields of `cls`, each with the group that declares it."""
    declared: dict[str, type[Any]] = {}
    for group in cls.__mro__:  # the first to declare a flag decides
        for name in vars(group).get("__annotations__", {}):
            declared.setdefault(name, group)
    return {name: group for name, group in declared.items() if PlannedFlags in group.__bases__}


def default_of(each: dataclasses.Field[Any]) -> Any:
    """A field's default."""
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default


def check_planned(args: Any) -> None:
    """UserError for the first planned flag whose value asks for what is not there."""
    groups = planned_flags(type(args))
    for each in dataclasses.fields(args):
        if each.name not in groups:
            continue
        value = getattr(args, each.name)
        if value in (default_of(each), "", [""], *OFF.get(each.name, ())):
            continue
        if each.name in NOTED:
            logger.info("--%s %s: %s", each.name, typed(value), NOTED[each.name])
        else:
            raise UserError(f"--{each.name} {typed(value)}: {refusal(each.name, groups)}")


def refusal(name: str, groups: dict[str, type[Any]]) -> str:
    """Why flag `name` has no effect yet, and what to do."""
    title = (groups[name].__doc__ or "").splitlines()[0]
    return NOTED.get(name) or REASONS.get(name, f"{title} is not supported yet: drop it")
