"""A loaded model that answers conversations."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TextStreamer,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from swiftmeg import platform
from swiftmeg.args.infer import InferArguments
from swiftmeg.data.standard_row import RowTooLong
from swiftmeg.data.template.template import IGNORE, Template
from swiftmeg.data.turns import Message
from swiftmeg.errors import UserError
from swiftmeg.inference.adapter import tokenizer_folder, with_adapter
from swiftmeg.models.hf import needs_trust, trust_message


class Engine:
    """Tokenizer, template, weights and sampling of one model.

    Raises UserError if the folder holds no whole model, or the template does not fit it.
    """

    def __init__(self, args: InferArguments, folder: Path) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.tokenizer = _load_tokenizer(args, tokenizer_folder(args.adapters, folder))
        prefix = args.response_prefix
        self.prefix = prefix.replace("\\n", "\n") if prefix else ""
        self.template = Template(
            self.tokenizer,
            name=args.template,
            system=args.system,
            use_chat_template=args.use_chat_template,
            response_prefix=self.prefix or None,
        )
        self.model = _load_model(args, folder)
        if args.adapters:
            self.model = with_adapter(self.model, Path(args.adapters[0]).expanduser())
        self.stop_words = [word.replace("\\n", "\n") for word in args.stop_words]
        self._config = _generation_config(
            args, self.model.generation_config, self._stop_ids(), self.tokenizer.pad_token_id
        )
        self._max_new_tokens = args.max_new_tokens
        set_seed(args.seed)

    def prompt(self, messages: Sequence[Message], tools: str | None = None) -> list[int]:
        """Return the token ids after which the model is to answer `messages`.

        Raises RowError if the template refuses the messages, RowTooLong if they leave no room in
        the model's context for one token more.
        """
        ids = self.template.encode_prompt(messages, tools)
        limit = self._context_length
        if limit is not None and len(ids) >= limit:
            raise RowTooLong(
                f"longer than the model's context of {limit} tokens", f"{len(ids)} tokens"
            )
        return ids

    def answer(self, prompts: Sequence[list[int]]) -> list[str]:
        """Return the answers to `prompts` (each from `prompt`), generated in one batch."""
        outputs = self._generate(prompts)
        return [self.prefix + self._text(output) for output in outputs]

    def stream(self, prompt: list[int], show: Callable[[str], None]) -> str:
        """Return the answer to `prompt`; `show` gets it in pieces while it is generated."""
        if self.prefix:
            show(self.prefix)
        pieces = _Pieces(self.tokenizer, show, self.stop_words)
        (output,) = self._generate([prompt], streamer=pieces)
        return self.prefix + self._text(output)

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[list[int]], streamer: TextStreamer | None = None
    ) -> list[list[int]]:
        """Return the new token ids per prompt, up to and without the one that ended it."""
        longest = max(map(len, prompts))
        # On the left, so that all answers start in the same column.
        ids = torch.tensor(
            [[self._config.pad_token_id] * (longest - len(p)) + p for p in prompts],
            device=self.model.device,
        )
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device
        )
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._config,
            max_new_tokens=self._room(longest),
            stop_strings=self.stop_words or None,
            tokenizer=self.tokenizer,
            streamer=streamer,
        )
        ends = set(self._config.eos_token_id)
        answers = output[:, longest:].tolist()
        return [
            answer[: next((i for i, token in enumerate(answer) if token in ends), None)]
            for answer in answers
        ]

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text[: _first_stop(text, self.stop_words)]

    @property
    def _context_length(self) -> int | None:
        """Tokens that the model can attend to; None if config.json does not say."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def _room(self, prompt_length: int) -> int:
        limit = self._context_length
        if limit is None and self._max_new_tokens is None:
            raise UserError("config.json states no context length: give --max_new_tokens")
        rooms = [self._max_new_tokens, limit - prompt_length if limit is not None else None]
        return min(room for room in rooms if room is not None)

    def _stop_ids(self) -> list[int]:
        """Tokens that end an answer: the model's, the tokenizer's, and the template's end of turn.

        The last is found by rendering a turn: a base model's own end token may be another one.
        """
        own = self.model.generation_config.eos_token_id
        ids = {own} if isinstance(own, int) else set(own or ())
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        labels = self.template.encode({"messages": turn})["labels"]
        closing = next(label for label in reversed(labels) if label != IGNORE)
        if closing in self.tokenizer.added_tokens_decoder:
            ids.add(closing)
        return sorted(ids)


class _Pieces(TextStreamer):
    """Hands text on as it is generated, and holds back what may be part of a stop word."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None], stop_words: list[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._stop_words = stop_words
        self._held = ""
        self._stopped = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._stopped:
            return
        self._held += text
        end = _first_stop(self._held, self._stop_words)
        if end is not None:
            self._stopped = True
        else:
            keep = 0 if stream_end else max((len(w) - 1 for w in self._stop_words), default=0)
            end = max(0, len(self._held) - keep)
        if self._held[:end]:
            self._show(self._held[:end])
        self._held = self._held[end:]


def _first_stop(text: str, words: Sequence[str]) -> int | None:
    """Return where the first stop word begins in `text`, None if there is none."""
    return min((at for word in words if (at := text.find(word)) >= 0), default=None)


def _load_tokenizer(args: InferArguments, folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # tokenizers raises bare ones
        if needs_trust(error):
            raise UserError(trust_message(folder, "the tokenizer")) from None
        raise UserError(
            f"--model {folder}: the tokenizer cannot be read ({_line(error)})"
        ) from None
    if tokenizer.pad_token_id is None:
        # Masked wherever it is used; any token does.
        tokenizer.pad_token_id = tokenizer.eos_token_id or 0
    return tokenizer


def _load_model(args: InferArguments, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        mcore = any(folder.glob("iter_*"))
        hint = ": convert this Megatron checkpoint with swift export --to_hf true" if mcore else ""
        raise UserError(f"--model {folder}: there is no config.json in this folder{hint}")
    dtype = args.torch_dtype or ("auto" if platform.has_cuda() else "float32")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=args.device_map,
            attn_implementation=args.attn_impl,
            trust_remote_code=args.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # broken folders raise errors of many kinds
        if needs_trust(error):
            raise UserError(trust_message(folder, "the model")) from None
        raise UserError(f"--model {folder}: cannot be loaded ({_line(error)})") from None
    if loading["missing_keys"]:
        # transformers would go on with random numbers.
        names = ", ".join(sorted(loading["missing_keys"])[:5])
        raise UserError(f"--model {folder}: weights are missing: {names}")
    return model if args.device_map else model.to(platform.device())


def _generation_config(
    args: InferArguments, base: GenerationConfig, stop_ids: list[int], pad_id: int
) -> GenerationConfig:
    """Return the model's own generation config with what the flags say instead."""
    config = copy.deepcopy(base)
    config.eos_token_id = stop_ids
    config.pad_token_id = pad_id
    config.max_length = None  # _room decides
    config.num_beams = args.num_beams
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    if args.temperature == 0:
        config.do_sample = False
    elif any(value is not None for value in (args.temperature, args.top_k, args.top_p)):
        config.do_sample = True
    if not config.do_sample:
        config.temperature = config.top_k = config.top_p = None
    return config


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
