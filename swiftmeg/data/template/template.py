"""From a conversation to token ids and labels."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swiftmeg.data.standard_row import Row, RowError, RowTooLong
from swiftmeg.data.template.chat_templates import GENERATION, ChatTemplate, find_chat_template
from swiftmeg.data.template.loss_weights import LossScale, Weighted
from swiftmeg.data.template.span_tokenizer import SpanTokenizer
from swiftmeg.data.template.turn_cache import Shapes, quoted_markup
from swiftmeg.data.tools import check_answered, parse_tools, to_chat
from swiftmeg.data.turns import Message, Turn, assistant_turns
from swiftmeg.errors import UserError

Array = np.ndarray[Any, Any]

IGNORE = -100
"""The label of a token that is not trained."""

TRUNCATION_STRATEGIES = ("delete", "left", "right")


class Encoded(NamedTuple):
    """A row as tokens: two arrays, int32 [length]; see `Template.encode`. `loss_scale` (float32)
    are the tokens' weights in the loss; None: all have the weight 1."""

    input_ids: Array
    labels: Array
    loss_scale: Array | None = None


class Template:
    """Turns rows into token ids and labels by a chat template.

    `name` chooses a template of `chat_templates` (or a .jinja file) instead of the tokenizer's
    own. `system` is used for rows without a system message: literal text, in which a backslash
    and an n stand for a line break, or the path of a .txt file. `max_length` counts tokens of one
    row; None means no limit. `use_chat_template=False` or `name="generation"` joins the
    messages' texts without any markup, between the BOS token, if the tokenizer has one, and EOS.

    Raises UserError for unknown options, a tokenizer without a chat template, or a named template
    whose tokens the tokenizer lacks.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str | None = None,
        system: str | None = None,
        max_length: int | None = None,
        truncation_strategy: str = "delete",
        loss_scale: str = "default",
        use_chat_template: bool = True,
        response_prefix: str | None = None,
        agent_template: str | None = None,
    ) -> None:
        _check_choice("--truncation_strategy", truncation_strategy, TRUNCATION_STRATEGIES)
        if max_length is not None and max_length < 2:
            raise UserError(f"--max_length {max_length}: must be at least 2")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        self.loss_scale = LossScale.parse(loss_scale)
        self.response_prefix = response_prefix
        self.context_only_turns = 0
        """How many assistant turns were not trained because the template strips their thinking."""
        self.chat: ChatTemplate | None = None
        if use_chat_template and name != GENERATION:
            self.chat = _chat_template(tokenizer, name)
        _check_agent_template(agent_template, self.chat)
        self.system = _read_system(system)
        if self.system is None and self.chat is not None:
            self.system = self.chat.system
        self._tokens = SpanTokenizer(tokenizer)
        self._end_tokens = _end_tokens(tokenizer)
        markup = {*self._end_tokens, *(quoted_markup(self.chat.jinja) if self.chat else ())}
        self._shapes = Shapes(lambda messages: self._turns(messages, None), markup)

    @property
    def weighted(self) -> bool:
        """Whether encoded rows have `loss_scale`."""
        return self.loss_scale.weighted

    def identity(self) -> dict[str, Any]:
        """Return all that decides the outcome of `encode`, as JSON-able values."""
        return {
            "tokenizer": self._tokens.fingerprint(),
            "special_tokens": {
                key: str(value) for key, value in self.tokenizer.special_tokens_map.items()
            },
            "jinja": self.chat.jinja if self.chat else None,
            "system": self.system,
            "max_length": self.max_length,
            "truncation_strategy": self.truncation_strategy,
            "loss_scale": self.loss_scale.name,
        }

    def encode(self, row: Row) -> dict[str, list[int]]:
        """Return `input_ids` and `labels`, two lists of ints of one length, for a standard row, and
        `loss_scale`, weights, if there are others than 1.

        `labels[i]` is `input_ids[i]` where token i is trained, else -100; it is not shifted, and
        `labels[0]` is always -100, since nothing comes before the first token.

        Raises RowError if the row cannot be used (RowTooLong if it is over `max_length` and the
        strategy is `delete`), and UserError if the template leaves it open which text is the
        assistant's.
        """
        (outcome,) = self.encode_many([row])
        if not isinstance(outcome, Encoded):
            raise outcome
        return {
            name: array.tolist() for name, array in outcome._asdict().items() if array is not None
        }

    def encode_many(
        self, rows: Sequence[Row], last_turns: int | None = None
    ) -> list[Encoded | RowError | UserError]:
        """Return for each row what `encode` returns, as arrays, or raises.

        With `last_turns` at most so many assistant turns are trained, the last ones.
        """
        outcomes: list[Any] = [None] * len(rows)
        places, texts, parts = [], [], []
        for place, row in enumerate(rows):
            try:
                text, trained = self._trained_text(row, last_turns)
            except (RowError, UserError) as error:
                outcomes[place] = error
            else:
                places.append(place)
                texts.append(text)
                parts.append(trained)
        spans = [[(start, end) for start, end, _ in row_parts] for row_parts in parts]
        tokens = self._tokens.ids_and_spans(texts, spans)
        for place, (ids, found), row_parts in zip(places, tokens, parts, strict=True):
            try:
                outcomes[place] = self._labelled(ids, found, [weight for *_, weight in row_parts])
            except RowError as error:
                outcomes[place] = error
        return outcomes

    def _trained_text(self, row: Row, last_turns: int | None) -> tuple[str, list[Weighted]]:
        """Return a row's text and which of its characters are trained, with their weights."""
        messages = to_chat(row["messages"])
        check_answered(messages)
        if self.chat is None:
            text, turns = self._join(messages)
        else:
            tools = parse_tools(row.get("tools"))
            self._check_tools_shown(messages, tools)
            text, turns = self._render(messages, tools)
        self._refuse_far_too_long(text)
        if self.loss_scale.strategy == "all":
            return text, self.loss_scale.weigh(text, 0, len(text))
        turns = turns if last_turns is None else turns[-last_turns:]
        trained = [turn for turn in turns if turn.trained]
        self.context_only_turns += len(turns) - len(trained)
        return text, [part for turn in trained for part in self._weigh(text, turn)]

    def _weigh(self, text: str, turn: Turn) -> list[Weighted]:
        """Divide a turn by weight; that of the token that closes it is 1."""
        closing = ""
        if self.loss_scale.weighted:
            said = text[turn.start : turn.end]
            ends = [end for end in self._end_tokens if said.endswith(end)]
            closing = max(ends, key=len, default="")
        content_end = turn.end - len(closing)
        parts = self.loss_scale.weigh(text, turn.start, content_end)
        return [*parts, (content_end, turn.end, 1.0)] if closing else parts

    def _check_tools_shown(self, messages: list[Message], tools: list[Any] | None) -> None:
        """RowError for what the template does not even mention, and would drop in silence."""
        assert self.chat is not None
        if tools and not re.search(r"\btools\b", self.chat.jinja):
            raise RowError("the chat template does not show tools")
        if "tool_calls" not in self.chat.jinja and any("tool_calls" in each for each in messages):
            raise RowError("the chat template does not show tool calls")

    def _labelled(self, ids: Array, spans: list[tuple[int, int]], weights: list[float]) -> Encoded:
        labels = np.full_like(ids, IGNORE)
        loss_scale = np.zeros(len(ids), dtype=np.float32) if self.weighted else None
        for (start, end), weight in zip(spans, weights, strict=True):
            labels[start:end] = ids[start:end]
            if loss_scale is not None:
                loss_scale[start:end] = weight
        return self.fit_to(Encoded(ids, labels, loss_scale), len(ids))

    def fit_to(self, row: Encoded, longest: int) -> Encoded:
        """Cut a row as if it had `longest` tokens, or raise RowTooLong; see `encode`."""
        row = self._fit(row, longest)
        row.labels[:1] = IGNORE
        if (row.labels == IGNORE).all():
            raise RowError("no token to train")
        return row

    def encode_prompt(
        self, messages: Sequence[Message], tools: str | list[Any] | None = None
    ) -> list[int]:
        """Return the token ids after which the model is to generate the next assistant turn.

        `response_prefix` is appended. Raises RowError if the template refuses the messages.
        """
        chat = to_chat(messages)
        if self.chat is None:
            text = self._bos() + "".join(message["content"] for message in chat)
        else:
            text = self._apply(self._with_system(chat), parse_tools(tools), True)
        return self._tokens.ids(text + (self.response_prefix or ""))

    def _bos(self) -> str:
        return self.tokenizer.bos_token or ""

    def _join(self, messages: list[Message]) -> tuple[str, list[Turn]]:
        """Join the texts between BOS and EOS; the assistant's and EOS are its turns."""
        text, turns = self._bos(), []
        for message in messages:
            start = len(text)
            text += message["content"]
            if message is messages[-1]:
                text += self.tokenizer.eos_token or ""
            if message["role"] == "assistant":
                turns.append(Turn(start, len(text)))
        return text, turns[-1:] if self._last_round else turns

    def _render(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Turn]]:
        messages = self._with_system(messages)
        try:
            text, turns = self._located(messages, tools)
        except UserError as error:
            # Either the template rewrites every conversation, or this one holds what it takes
            # for its own markup.
            self._turns(_plain(messages), tools)
            raise RowError("its text confuses the chat template", str(error)) from None
        eos = self.tokenizer.eos_token
        if eos and not text.rstrip().endswith(self._end_tokens):
            # The template closes turns by opening the next: without this, nothing would teach
            # the model to stop.
            text += eos
            turns[-1] = Turn(turns[-1].start, len(text))
        return text, turns

    def _located(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Turn]]:
        if tools is None:
            text = self._apply(messages, None, False)
            turns = self._shapes.turns(messages, text)
            if turns is not None:
                return text, turns
        return self._turns(messages, tools)

    def _turns(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Turn]]:
        return assistant_turns(
            messages,
            lambda part, prompt: self._apply(part, tools, prompt),
            self._end_tokens,
            last_only=self._last_round,
        )

    @property
    def _last_round(self) -> bool:
        return self.loss_scale.strategy == "last_round"

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _apply(
        self, messages: Sequence[Message], tools: list[Any] | None, generation_prompt: bool
    ) -> str:
        assert self.chat is not None
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.chat.jinja,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # a template is a program, with all that programs raise
            raise RowError("the chat template refuses the messages", str(error)) from None
        return str(text)

    def _refuse_far_too_long(self, text: str) -> None:
        """Tokenising megabytes, only to drop them, would take seconds a row."""
        if self.max_length is not None and self.truncation_strategy == "delete":
            if (tokens := self._tokens.at_least(text)) > self.max_length:
                raise self._too_long(f"at least {tokens}")

    def _too_long(self, tokens: str) -> RowTooLong:
        return RowTooLong(f"longer than --max_length {self.max_length}", f"{tokens} tokens")

    def _fit(self, row: Encoded, longest: int) -> Encoded:
        limit = self.max_length
        if limit is None or longest <= limit:
            return row
        if self.truncation_strategy == "delete":
            raise self._too_long(str(longest))
        left = self.truncation_strategy == "left"
        part = slice(longest - limit, None) if left else slice(limit)
        weights = None if row.loss_scale is None else row.loss_scale[part]
        return Encoded(row.input_ids[part], row.labels[part], weights)


def _plain(messages: list[Message]) -> list[Message]:
    """The same conversation with texts that no template treats specially."""
    return [{**message, "content": f"text {k}"} for k, message in enumerate(messages)]


def _check_choice(flag: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise UserError(f"{flag} {value}: unknown; accepted: {', '.join(accepted)}")


def _check_agent_template(name: str | None, chat: ChatTemplate | None) -> None:
    """UserError unless tools are written as `name` says, or nothing is said."""
    if name is None:
        return
    if name != "hermes":
        raise UserError(
            f"--agent_template {name}: tools are written as the chat template says: drop it"
        )
    if chat is None or "<tool_call>" not in chat.jinja:
        raise UserError(
            "--agent_template hermes: the chat template writes no <tool_call>: drop it, or choose "
            "--template chatml, qwen or qwen2_5"
        )


def _chat_template(tokenizer: Any, name: str | None) -> ChatTemplate:
    if name is None:
        try:
            return ChatTemplate(tokenizer.get_chat_template())
        except ValueError:
            raise UserError(
                "the model's tokenizer has no chat template: choose one with --template "
                "(for example chatml), or train on plain text with --use_chat_template false"
            ) from None
    chat = find_chat_template(name)
    missing = [token for token in chat.tokens if token not in tokenizer.added_tokens_encoder]
    if missing:
        raise UserError(
            f"--template {name}: the tokenizer has no token {' '.join(missing)}: add it by "
            "--new_special_tokens, or choose another template"
        )
    return chat


def _end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the tokens that may close a turn: special ones and other markers.

    `</think>`, `</tool_call>` and their like are added tokens too, but close a part of a turn.
    """
    texts = {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}
    special = {
        *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
        *tokenizer.all_special_tokens,
    }
    return tuple(
        sorted(
            text
            for text in texts
            if text.strip() and (text in special or not text.startswith("</"))
        )
    )


def _read_system(system: str | None) -> str | None:
    if system is None:
        return None
    if system.endswith(".txt"):
        try:
            return Path(system).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"--system {system}: cannot be read ({error.strerror})") from None
    return system.replace("\\n", "\n")
