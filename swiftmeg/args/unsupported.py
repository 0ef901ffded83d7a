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
    padding_side: Literal["right", "left"] = "right"
    """Where rows are padded."""
    template_backend: Literal["swift", "jinja"] | None = None
    """Who renders the chat template."""
    response_prefix: str | None = None
    """Text that every answer starts with; for `swift infer`."""


@dataclass
class PlannedModelArguments(PlannedFlags):
    """Further model options"""

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
    quant_method: str | None = None
    """How weights are quantised."""
    quant_bits: str | None = None
    """Bits of a quantised weight."""
    hqq_axis: int | None = None
    """Axis of HQQ's groups."""
    bnb_4bit_compute_dtype: str | None = None
    """Dtype in which bitsandbytes computes."""
    bnb_4bit_quant_type: str = "nf4"
    """Data type of bitsandbytes' weights."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise bitsandbytes' scales, too."""
    bnb_4bit_quant_storage: str | None = None
    """Dtype in which bitsandbytes stores weights."""
    safe_serialization: bool = True
    """Write safetensors."""


@dataclass
class AcceptedArguments(PlannedFlags):
    """Accepted without effect"""

    apply_query_key_layer_scaling: bool | None = None
    """Divide attention scores by the layer's number before the softmax and multiply after."""
    local_rank: int | None = None
    """Rank on this machine."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where curves are written."""
    check_model: bool = True
    """Compare the model's files with the hub's."""
    ignore_args_error: bool = False
    """Go on with flags that are not known."""
    remove_unused_columns: bool = True
    """Leave unknown columns of rows behind."""
    max_new_tokens: int | None = None
    """Longest answer of swift infer."""
    temperature: float | None = None
    """Temperature of swift infer."""
    top_k: int | None = None
    """Tokens that swift infer draws from."""
    top_p: float | None = None
    """Probability that swift infer draws from."""
    repetition_penalty: float | None = None
    """Penalty of swift infer on tokens that were there."""
    num_beams: int = 1
    """Beams of swift infer."""
    stream: bool | None = None
    """Print answers of swift infer word by word."""
    stop_words: list[str] = field(default_factory=list)
    """Words that end an answer of swift infer."""
    logprobs: bool = False
    """Write log-probabilities of swift infer."""
    top_logprobs: int | None = None
    """Tokens of which swift infer writes log-probabilities."""


@dataclass
class PlannedRunArguments(PlannedFlags):
    """Further options of a run"""

    tuner_backend: Literal["peft", "unsloth"] = "peft"
    """Whose adapters are trained."""


@dataclass
class PlannedArguments(
    PlannedDataArguments,
    PlannedModelArguments,
    PlannedRunArguments,
    AcceptedArguments,
):
    """Every planned flag of the training commands."""


OFF: dict[str, tuple[Any, ...]] = {
    "template_backend": ("swift",),
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
    "template_backend": "chat templates are jinja in any case: drop it",
    "task_type": "only causal_lm is supported yet",
    "num_labels": "classifiers are not supported yet",
    "problem_type": "classifiers are not supported yet",
    "attn_impl": "it is a flag of swift infer; in training --attention_backend chooses kernels",
    "device_map": "it is a flag of swift infer; here the parallel sizes place the weights",
    "max_memory": "the parallel sizes place the weights: drop it",
    "local_repo_path": "models come from --model alone: drop it",
    "init_strategy": "every weight must be in the folder: drop it",
    **dict.fromkeys(
        (
            *("quant_method", "quant_bits", "hqq_axis", "bnb_4bit_compute_dtype"),
            *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
        ),
        "weights are not quantised: drop it, and quantise the folder that swift export writes",
    ),
    "safe_serialization": "weights are written as safetensors, which hold no code: drop it",
    "tuner_backend": "adapters are those of PEFT: drop it",
}
"""What a refusal says instead of naming the group's feature."""

_INFERENCE = "it is a flag of swift infer"

ACCEPTED = {
    "apply_query_key_layer_scaling": "it changes no result, and attention keeps its scores in fp32",
    "local_rank": "the launcher's variables say which rank a process is",
    "report_to": "curves go to TensorBoard, and to Weights & Biases with --wandb_project",
    "check_model": "weights are checked against config.json in any case",
    "ignore_args_error": "a flag that is not known ends the command in any case",
    "remove_unused_columns": "rows hold the known columns only",
    **dict.fromkeys(
        (
            *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"),
            *("num_beams", "stream", "stop_words", "logprobs", "top_logprobs"),
        ),
        _INFERENCE,
    ),
}
"""What is said where a flag is accepted without effect, whatever its value."""


def planned_flags(cls: type[Any]) -> dict[str, type[Any]]:
    """The planned fields of `cls`, each with the group that declares it."""
    declared: dict[str, type[Any]] = {}
    for group in cls.__mro__:  # the first to declare a flag decides
        for name in vars(group).get("__annotations__", {}):
            declared.setdefault(name, group)
    return {name: group for name, group in declared.items() if PlannedFlags in group.__bases__}


def accepted_flags(cls: type[Any]) -> list[str]:
    """The fields of `cls` that are accepted without effect."""
    return [name for name, group in planned_flags(cls).items() if group is AcceptedArguments]


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
        if each.name in ACCEPTED or value in (
            default_of(each),
            "",
            [""],
            *OFF.get(each.name, ()),
        ):
            continue
        if each.name in NOTED:
            logger.info("--%s %s: %s", each.name, typed(value), NOTED[each.name])
        else:
            raise UserError(f"--{each.name} {typed(value)}: {refusal(each.name, groups)}")


def refusal(name: str, groups: dict[str, type[Any]]) -> str:
    """Why flag `name` has no effect yet, and what to do."""
    title = (groups[name].__doc__ or "").splitlines()[0]
    return NOTED.get(name) or REASONS.get(name, f"{title} is not supported yet: drop it")
