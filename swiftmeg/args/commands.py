"""The arguments of each command."""

from dataclasses import dataclass, field

from swiftmeg.args.architecture import OverrideArguments, ShapeArguments
from swiftmeg.args.megatron import LoopArguments, MegatronArguments
from swiftmeg.args.model import (
    DataArguments,
    ModelArguments,
    PluginArguments,
    PromptArguments,
    TemplateArguments,
)
from swiftmeg.args.moe import (
    ExpertArguments,
    ExpertParallelArguments,
    ExpertShapeArguments,
    LatentShapeArguments,
    PredictionArguments,
    PredictionLossArguments,
)
from swiftmeg.args.preference import PreferenceArguments, ReferenceArguments, RlhfType
from swiftmeg.args.tuner import FreezingArguments, LoraArguments
from swiftmeg.args.unsupported import (
    PlannedArguments,
    PlannedModelArguments,
)


@dataclass
class SftArguments(
    ModelArguments,
    PluginArguments,
    TemplateArguments,
    DataArguments,
    LoopArguments,
    MegatronArguments,
    ExpertParallelArguments,
    ExpertArguments,
    PredictionArguments,
    PredictionLossArguments,
    LoraArguments,
    FreezingArguments,
    OverrideArguments,
    ShapeArguments,
    ExpertShapeArguments,
    LatentShapeArguments,
    PlannedArguments,
):
    """megatron sft: train on the assistant turns of conversations."""


@dataclass
class PtArguments(SftArguments):
    """megatron pt: train on every token of plain text."""

    use_chat_template: bool | None = False
    """Render messages with the chat template."""
    loss_scale: str | None = "all"
    """Which tokens are trained."""


@dataclass
class RlhfArguments(PreferenceArguments, ReferenceArguments, SftArguments):
    """megatron rlhf: train on preferences, given as pairs of a chosen and a rejected answer."""

    loss_scale: str | None = "last_round"
    """Which turns are answers: those from the first that differs; see data.md."""
    calculate_per_token_loss: bool = False
    """The loss is a mean over the pairs of the global batch; true is refused."""


@dataclass
class InspectionArguments:
    """Inspection"""

    inspect: bool = False
    """Print rows with what is trained of them, and draw their lengths."""
    inspect_samples: int = 3
    """Rows that are printed."""
    inspect_output: str = "data_lengths.png"
    """File of the drawing."""


@dataclass
class PrepareArguments(InspectionArguments, RlhfArguments):
    """megatron data: prepare the data of a training command, whose flags it takes."""

    rlhf_type: RlhfType | None = None
    """dpo: make pairs of a chosen and a rejected answer of rows that have both."""
    loss_scale: str | None = None
    """Which tokens are trained."""
    calculate_per_token_loss: bool = True
    """Divide the summed loss once by the trained tokens of the global batch."""


@dataclass
class ConversionArguments:
    """Conversion"""

    to_mcore: bool = False
    """Convert the Hugging Face folder --model to a Megatron checkpoint."""
    to_hf: bool = False
    """Convert the Megatron checkpoint --mcore_model to a Hugging Face folder."""
    mcore_model: str | None = None
    """Megatron checkpoint: the folder that holds iter_*."""
    output_dir: str | None = None
    """Folder to write. None: {model name}-mcore, {checkpoint name}-hf, or {adapters' name}-merged
    or -peft."""
    exist_ok: bool = False
    """Replace a folder that is not empty: its weights, and what the result has too."""
    test_convert_precision: bool = False
    """Compare both models' logits on a chat sample, computed in fp32 from weights of --torch_dtype;
    fail and write nothing where they differ by more than a thousandth of the largest logit. A model
    with adapters beside it is compared with the merged one before its weights are rounded, too."""
    max_shard_size: str = "5GB"
    """Largest safetensors file."""
    tensor_model_parallel_size: int = 1
    """Ranks that share every layer while converting."""
    pipeline_model_parallel_size: int = 1
    """Ranks that hold consecutive layers while converting."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first pipeline stage."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last pipeline stage."""


@dataclass
class AdapterArguments:
    """Adapters"""

    mcore_adapters: list[str] = field(default_factory=list)
    """LoRA checkpoint, the folder that holds iter_*, which --to_hf or --to_mcore merges. Its
    args.json names the model, and the Megatron checkpoint that its adapters were trained on."""
    adapters: list[str] = field(default_factory=list)
    """PEFT folder, which --merge_lora true merges into --model, or into the base that it names."""
    merge_lora: bool | None = None
    """Merge the adapters into the weights. None: true with --mcore_adapters; there false writes the
    adapters as a PEFT folder."""


@dataclass
class ExportArguments(
    ModelArguments,
    PluginArguments,
    PromptArguments,
    ConversionArguments,
    AdapterArguments,
    ExpertParallelArguments,
    OverrideArguments,
    ShapeArguments,
    ExpertShapeArguments,
    LatentShapeArguments,
    PredictionArguments,
    PlannedModelArguments,
):
    """swift export: convert weights between Hugging Face and Megatron."""

    extra_megatron_kwargs: dict[str, object] = field(default_factory=dict)
    """Other arguments of Megatron by name, as JSON."""
