"""Flags that say which weights are trained."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from swiftmeg.args.adapter_config import read_raw
from swiftmeg.args.resolve import read_args_file
from swiftmeg.errors import UserError


@dataclass
class FreezingArguments:
    """Freezing of parameters

    Parameters go by Megatron's names with the layer's number in the whole model, whatever the
    layout: `decoder.layers.0.self_attention.linear_qkv.weight`. A norm that TransformerEngine keeps
    inside a linear layer is known by both names, `decoder.layers.0.input_layernorm.weight` and
    `decoder.layers.0.self_attention.linear_qkv.layer_norm_weight`.
    """

    freeze_parameters: list[str] = field(default_factory=list)
    """Prefixes of the parameters that stay as they are."""
    freeze_parameters_regex: str | None = None
    """Regular expression, found anywhere in the name, of parameters that stay as they are."""
    freeze_parameters_ratio: float = 0.0
    """Share of all weights, counted from the embedding on, whose parameters stay as they are; needs
    the whole model on every rank, so no pipeline or expert parallelism."""
    trainable_parameters: list[str] = field(default_factory=list)
    """Prefixes of parameters that are trained although frozen otherwise."""
    trainable_parameters_regex: str | None = None
    """Regular expression of parameters that are trained although frozen otherwise."""

    @property
    def freezes(self) -> bool:
        """True if some flag freezes parameters."""
        return bool(
            self.freeze_parameters or self.freeze_parameters_regex or self.freeze_parameters_ratio
        )


@dataclass
class LoraArguments:
    """LoRA

    Modules go by Megatron's names: in `linear_qkv` the query, key and value projections share one
    adapter, in `linear_fc1` gate and up projection. Every routed expert has its own.
    """

    train_type: Literal["full", "lora"] = "full"
    """full trains every weight that is not frozen, lora adapters beside frozen weights."""
    adapter_load: str | None = None
    """LoRA checkpoint to continue, or with --finetune to start from: the folder that holds iter_*.
    Its args.json says how its adapters are made and, where --load is not given, on what."""
    adapters: list[str] = field(default_factory=list)
    """PEFT folder to start from. It says how its adapters are made and, where --model is not given,
    for which model."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Ends of the names of the modules that get an adapter, or all-linear (every linear layer of
    the decoder), all-router, all-embedding."""
    target_regex: str | None = None
    """Regular expression that fits the whole name of modules that get an adapter, such as
    `decoder.layers.[0-9].self_attention.linear_qkv`, in place of --target_modules."""
    modules_to_save: list[str] = field(default_factory=list)
    """Ends of the names of modules that are trained whole and kept with the adapters, such as
    word_embeddings and output_layer, or all-embedding."""
    lora_rank: int = 8
    """Rank of the adapters."""
    init_lora_weights: str = "true"
    """How adapters began: true (A uniform, B zero) or gaussian (A normal); from a PEFT folder also
    pissa and olora, whose base weights are --model's without the adapter's start."""
    lora_alpha: int = 32
    """Adapters are scaled by this, divided by the rank."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of modules that have another than --lora_rank, as JSON: PEFT's rank_pattern, with
    expressions for the ends of Megatron's names: `{"linear_proj": 16, "layers.0.*linear_fc2": 4}`.
    The first that fits counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """What modules have in place of --lora_alpha, in the form of --rank_pattern."""
    lora_dropout: float = 0.05
    """Dropout of the adapters' input."""
    lora_bias: Literal["none", "all"] = "none"
    """all trains every bias of the model, too."""
    use_rslora: bool = False
    """Divide the scale by the rank's square root instead of the rank (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the lengths of the rows of weight and adapter apart from their directions (DoRA,
    arXiv:2402.09353). Not for layers of a model's experts, which PEFT's DoRA does not reach."""
    lorap_lr_ratio: float | None = None
    """Learning rate of B, and of trained vectors such as biases, as a multiple of A's (LoRA+,
    arXiv:2402.12354). As in PEFT, an adapter of the embedding then trains at 1e-6."""

    @property
    def is_lora(self) -> bool:
        """True if adapters are trained."""
        return self.train_type == "lora"

    @property
    def peak_lr(self) -> float:
        """--lr, or the default of LoRA or full training."""
        given: float | None = getattr(self, "lr")  # noqa: B009  (a field of LearningRateArguments)
        return given if given is not None else 1e-4 if self.is_lora else 1e-5

    @property
    def continued(self) -> str:
        """The flag that names the checkpoint whose run is continued."""
        return "adapter_load" if self.is_lora else "load"


STARTS = ("adapter_load", "adapters")
"""What a run starts from; the rest of LoRA's flags say what an adapter is."""

ADAPTER = tuple(each.name for each in fields(LoraArguments) if each.name not in STARTS)
"""What an adapter is, as recorded in the args.json of a LoRA checkpoint."""


def recorded(
    flag: str, folder: str, given: dict[str, Any], base: str
) -> list[tuple[str, dict[str, Any]]]:
    """The resolver's layer for a LoRA checkpoint's args.json: the adapter, its base and model.

    `flag` names the checkpoint `folder`; `base` is the flag for the Megatron checkpoint that it
    was trained on. UserError if the folder says nothing of LoRA, or a given flag disagrees.
    """
    saved = read_args_file(Path(folder).expanduser())
    if saved.get("train_type") != "lora":
        raise UserError(
            f"--{flag} {folder}: no LoRA checkpoint, its args.json does not say train_type lora: "
            "name the folder that a run with --train_type lora wrote"
        )
    layer = {name: saved[name] for name in ADAPTER if name in saved}
    if given.get("finetune"):  # a run of its own, with learning rates of its own
        layer.pop("lorap_lr_ratio", None)
    for name, value in layer.items():
        if given.get(name, value) != value:
            raise UserError(
                f"--{name} {given[name]} contradicts --{flag} {folder}, whose adapters were made "
                f"with {value}: drop it"
            )
    layer[base] = saved.get("load")
    return [("the adapter's args.json", layer)]


def named_by_peft(folder: str) -> dict[str, Any]:
    """What a PEFT folder says of its model: the model itself and, in our own, how it is asked.

    UserError if the folder is none.
    """
    path = Path(folder).expanduser()
    config = read_raw(path)
    saved = read_args_file(path)
    names = ("template", "system", "use_chat_template")
    asked = {name: saved[name] for name in names if name in saved}
    return {"model": config.get("base_model_name_or_path")} | asked
