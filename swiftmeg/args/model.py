"""Flags that name the model, for every command."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelArguments:
    """Model"""

    model: str | None = None
    """Hugging Face folder: config.json, tokenizer and, unless --load gives a Megatron checkpoint,
    safetensors. None: the `model` recorded in the checkpoint's args.json."""
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the weights. None: as in config.json; training without a GPU: float32."""
    load_args: bool = True
    """Take what is not given on the command line from the checkpoint's args.json."""
    trust_remote_code: bool = False
    """Let transformers run code that comes with the model or its tokenizer."""


@dataclass
class PluginArguments:
    """Model source and plugins"""

    model_revision: str | None = None
    """Revision of a model that comes from a hub."""
    external_plugins: list[str] = field(default_factory=list)
    """Python files that are run first, e.g. to register datasets."""
    custom_register_path: list[str] = field(default_factory=list)
    """Like --external_plugins."""
    new_special_tokens: list[str] = field(default_factory=list)
    """Tokens to add to tokenizer and vocabulary, or .txt files with one per line."""
    model_kwargs: dict[str, object] | None = None
    """Environment variables as JSON; names are written in capitals."""


@dataclass
class PromptArguments:
    """Chat template"""

    template: str | None = None
    """Name of a built-in chat template. None: the tokenizer's own."""
    system: str | None = None
    """System message for rows that have none: the text itself or a .txt file."""
    use_chat_template: bool | None = None
    """Render messages with the chat template; false trains on plain text. None: true except for
    `megatron pt`."""


@dataclass
class TemplateArguments(PromptArguments):
    """Samples"""

    max_length: int | None = None
    """Longest sample in tokens. None: the model's max_position_embeddings."""
    truncation_strategy: Literal["delete", "left", "right"] = "delete"
    """What happens to longer samples: drop them, or cut them on one side."""
    agent_template: str | None = None
    """How tools are written: hermes, for chat templates that do so. None: as the template says."""
    loss_scale: str | None = None
    """Which tokens are trained: `default` (all assistant turns), `last_round` or `all`; and weights
    of parts of the text, alone or behind one of these: `react`, `last_round+hermes`. See data.md.
    None: `default`, for `megatron pt` `all`."""


@dataclass
class DataArguments:
    """Data"""

    dataset: list[str] = field(default_factory=list)
    """Training sets: `path`, `id` or `[hf::|ms::]id[:subset]`, each with an optional `#N`."""
    val_dataset: list[str] = field(default_factory=list)
    """Validation sets in the same syntax; switches --split_dataset_ratio off."""
    split_dataset_ratio: float = 0.0
    """Share of each training set that is held out for validation."""
    data_seed: int = 42
    """Seed of sampling and shuffling the rows."""
    dataset_num_proc: int = 1
    """Processes that read and tokenise rows."""
    dataset_shuffle: bool = True
    """Shuffle the training rows once after all sets are joined."""
    val_dataset_shuffle: bool = False
    """Shuffle the validation rows, by --data_seed; without, an evaluation takes them in order."""
    dataloader_type: Literal["single", "cyclic", "external"] = "cyclic"
    """Order of rows: `cyclic` shuffles them anew for every epoch, `single` takes every epoch in one
    order. `external` is the order of a stream, and goes with --streaming true."""
    interleave_prob: list[float] | None = None
    """Draw rows from the sets with these probabilities instead of joining the sets."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """When interleaving ends."""
    columns: dict[str, str] | None = None
    """Column renames before rows are read: {"old": "new"}."""
    custom_dataset_info: list[str] = field(default_factory=list)
    """JSON files that register datasets, by name, hub id or path."""
    load_data_args: bool = False
    """Take these data flags, too, from the checkpoint's args.json where they are not given."""
    strict: bool = False
    """Stop at the first bad row instead of dropping and counting it."""
    model_name: list[str] | None = None
    """Fills {{NAME}} in self-cognition rows: one value, or a Chinese and an English one."""
    model_author: list[str] | None = None
    """Fills {{AUTHOR}} in self-cognition rows: one value, or a Chinese and an English one."""
    use_hf: bool = False
    """Look hub ids up on Hugging Face instead of ModelScope."""
    load_from_cache_file: bool = True
    """Use what was read from the same files before."""
    download_mode: Literal["reuse_dataset_if_exists", "force_redownload"] = (
        "reuse_dataset_if_exists"
    )
    """Whether datasets that were downloaded before are downloaded again."""
    hub_token: str | None = None
    """Access token of the hub; never written to args.json."""
    packing: bool = False
    """Fill rows of --max_length tokens with whole samples that do not see each other."""
    streaming: bool = False
    """Read and tokenise rows while training: for sets that are too large to be prepared, or
    endless. Needs --train_iters; --max_epochs ends sooner."""
    shuffle_buffer_size: int = 1000
    """Rows among which --streaming shuffles."""
    lazy_tokenize: bool | None = None
    """Tokenise rows while training instead of before. None: false."""
    padding_free: bool = True
    """Join a micro-batch's samples into one row without padding; false pads them side by side."""
