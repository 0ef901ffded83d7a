"""The arguments of `swift infer`."""

from dataclasses import dataclass, field
from typing import Literal

from swiftmeg.args.model import ModelArguments
from swiftmeg.errors import UserError


@dataclass
class AnsweringModelArguments(ModelArguments):
    """Model"""

    model: str | None = None
    """Hugging Face folder or hub id of the model that answers."""
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the weights. None: as in config.json; without a GPU float32."""
    load_args: bool = True
    """Take template, system and use_chat_template, where not given, from the model's args.json."""
    use_hf: bool = False
    """Look hub ids up on Hugging Face instead of ModelScope."""
    hub_token: str | None = None
    """Access token of the hub, for --val_dataset."""
    adapters: list[str] = field(default_factory=list)
    """PEFT folder that is put beside the model; it names the model where --model is not given."""
    infer_backend: Literal["pt"] = "pt"
    """Who generates: only transformers (pt)."""
    attn_impl: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention implementation of transformers. None: its choice."""
    device_map: str | None = None
    """Placement by accelerate, such as `auto` to spread layers over GPUs. None: the first GPU, or
    the CPU if there is none."""


@dataclass
class PromptArguments:
    """Prompt"""

    template: str | None = None
    """Name of a built-in chat template or a .jinja file. None: the tokenizer's own."""
    system: str | None = None
    """System message for conversations that have none: the text itself or a .txt file."""
    use_chat_template: bool = True
    """Render messages with the chat template; false continues plain text."""
    response_prefix: str | None = None
    """Text that every answer starts with, such as `<think>`; \\n stands for a line break."""


@dataclass
class SamplingArguments:
    """Generation"""

    stream: bool | None = None
    """Print an answer while it is generated. None: true in a chat on one beam, else false."""
    max_new_tokens: int | None = None
    """Most tokens of an answer. None: what the model's context length leaves."""
    temperature: float | None = None
    """Flattens (above 1) or sharpens the distribution that tokens are drawn from; 0 always takes
    the likeliest. None: as in generation_config.json."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only. None: as in generation_config.json."""
    top_p: float | None = None
    """Draw from the likeliest tokens that have this share together. None: as in
    generation_config.json."""
    repetition_penalty: float | None = None
    """Divides the scores of tokens seen before; above 1 discourages. None: as in
    generation_config.json."""
    num_beams: int = 1
    """Beams of a beam search; 1 switches it off."""
    stop_words: list[str] = field(default_factory=list)
    """Texts that end an answer; they are not part of it."""
    seed: int = 42
    """Seed of the drawing."""


@dataclass
class InferenceDataArguments:
    """Data"""

    val_dataset: list[str] = field(default_factory=list)
    """Rows to answer instead of a chat: `path` or `[hf::|ms::]id[:subset]`, each with an optional
    `#N` sample. A last assistant turn becomes the label."""
    external_plugins: list[str] = field(default_factory=list)
    """Python files that are run first, e.g. to register datasets."""
    custom_register_path: list[str] = field(default_factory=list)
    """Like --external_plugins."""
    custom_dataset_info: list[str] = field(default_factory=list)
    """JSON files that register datasets."""
    val_dataset_sample: int | None = None
    """Answer only the first N rows."""
    val_dataset_shuffle: bool = False
    """Shuffle the rows, by --data_seed, before they are answered."""
    data_seed: int = 42
    """Seed of sampling and shuffling the rows."""
    dataset_num_proc: int = 1
    """Processes that read the rows."""
    columns: dict[str, str] | None = None
    """Column renames before rows are read: {"old": "new"}."""
    strict: bool = False
    """Stop at the first bad row instead of dropping and counting it."""
    model_name: list[str] | None = None
    """Fills {{NAME}} in self-cognition rows: one value, or a Chinese and an English one."""
    model_author: list[str] | None = None
    """Fills {{AUTHOR}} in self-cognition rows: one value, or a Chinese and an English one."""
    max_batch_size: int = 1
    """Rows that are answered together."""
    metric: Literal["acc"] | None = None
    """Compare answers with labels: acc is the share of rows whose answer equals the label."""
    result_path: str | None = None
    """File that a JSON line per answer is appended to. None: infer_result/{time}.jsonl in the
    model's folder."""


@dataclass
class InferArguments(
    AnsweringModelArguments, PromptArguments, SamplingArguments, InferenceDataArguments
):
    """swift infer: chat with a model, or let it answer the rows of a dataset."""

    def check(self) -> None:
        """Raise UserError for values out of range and for combinations that cannot work."""
        if len(self.adapters) > 1:
            raise UserError(
                f"--adapters {' '.join(self.adapters)}: one adapter can be used: name one"
            )
        for name, lowest in (
            ("max_new_tokens", 1),
            ("temperature", 0),
            ("top_k", 1),
            ("num_beams", 1),
            ("max_batch_size", 1),
            ("val_dataset_sample", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"--{name} {value} must be at least {lowest}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p} must be above 0 and at most 1")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise UserError(f"--repetition_penalty {self.repetition_penalty} must be above 0")
        if self.stream and self.num_beams > 1:
            raise UserError(
                f"--stream true cannot show the answer of --num_beams {self.num_beams},"
                " which is known only at the end: choose one"
            )
        if not self.val_dataset:
            if self.metric:
                raise UserError(f"--metric {self.metric} needs --val_dataset")
            if self.max_batch_size > 1:
                raise UserError(
                    f"--max_batch_size {self.max_batch_size} needs --val_dataset:"
                    " a chat has one answer at a time"
                )
        elif self.stream and self.max_batch_size > 1:
            raise UserError(
                f"--stream true shows one answer at a time: --max_batch_size"
                f" {self.max_batch_size} must be 1"
            )
