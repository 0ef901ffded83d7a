"""From a conversation to token ids and labels."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from swiftmeg.data.standard_row import Row, RowError, RowTooLong, messages_of
from swiftmeg.data.template.chat_renderer import ChatRenderer, EndlessTemplate
from swiftmeg.data.template.chat_templates import GENERATION, ChatTemplate
from swiftmeg.data.template.loss_weights import LossScale, Weighted
from swiftmeg.data.template.loss_wishes import Choice, Part, Wishes, divide, looked_for, outside
from swiftmeg.data.template.span_tokenizer import SpanTokenizer
from swiftmeg.data.template.template_options import (
    check_agent_template,
    check_choice,
    end_tokens,
    read_system,
)
from swiftmeg.data.template.turn_cache import Shapes, quoted_markup
from swiftmeg.data.tools import check_answered, loss_wishes, parse_tools, to_chat
from swiftmeg.data.turns import REASONING, Message, Render, Turn, find_turns
from swiftmeg.errors import UserError

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

IGNORE = -100
"""The label of a token that is not trained."""

UNSHOWN_REASONING = (
    "%d messages have reasoning_content that the chat template does not show: it is not trained; "
    "choose another template with --template, or write it into the content between <think> and "
    "</think>"
)
"""What is said of thinking beside the content that a template leaves out."""

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
    `vocab_size` is the model's: a row with another token ends the run.

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
        vocab_size: int | None = None,
    ) -> None:
        check_choice("--truncation_strategy", truncation_strategy, TRUNCATION_STRATEGIES)
        if max_length is not None and max_length < 2:
            raise UserError(f"--max_length {max_length}: must be at least 2")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        self.loss_scale = LossScale.parse(loss_scale)
        self.response_prefix = response_prefix
        self.counts: Counter[str] = Counter()
        """`context_only_turns`: assistant turns that were not trained because the template strips
        their thinking; `unshown_reasoning`: messages with thinking that it does not show."""
        self._renderer: ChatRenderer | None = None
        if use_chat_template and name != GENERATION:
            self._renderer = ChatRenderer(tokenizer, name)
        check_agent_template(agent_template, self._renderer)
        self.system = read_system(system)
        if self.system is None and self.chat is not None:
            self.system = self.chat.system
        self._tokens = SpanTokenizer(tokenizer)
        self._end_tokens = end_tokens(tokenizer)
        markup = {*self._end_tokens, *(quoted_markup(self.chat.jinja) if self.chat else ())}
        self._shapes = Shapes(self._turns_by_strategy, markup)

    @property
    def chat(self) -> ChatTemplate | None:
        """The chat template; None where texts are joined without one."""
        return self._renderer.chat if self._renderer else None

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
            "tools_jinja": self._renderer.tools_jinja if self._renderer else None,
            "system": self.system,
            "max_length": self.max_length,
            "truncation_strategy": self.truncation_strategy,
            "loss_scale": self.loss_scale.name,
            "vocab_size": self.vocab_size,
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
        said = self.counts["unshown_reasoning"]
        (outcome,) = self.encode_many([row])
        if not said and (found := self.counts["unshown_reasoning"]):
            logger.warning("%s: " + UNSHOWN_REASONING, row.get("origin", "a row"), found)
        if isinstance(outcome, UserError) and "origin" in row:
            raise UserError(f"{row['origin']}: {outcome}")
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
            except (RowError, UserError) as error:
                outcomes[place] = error
        return outcomes

    def _trained_text(self, row: Row, last_turns: int | None) -> tuple[str, list[Weighted]]:
        """Return a row's text and which of its characters are trained, with their weights."""
        standard = messages_of(row)
        messages, wishes = to_chat(standard), loss_wishes(standard)
        check_answered(messages)
        choice = Choice(self.loss_scale.strategy, last_turns)
        if self._renderer is None:
            text, parts = self._join(messages, choice.wanted(messages, wishes))
        else:
            tools = parse_tools(row.get("tools"))
            messages = self._renderer.prepared(messages, tools)
            if self._adds_system(messages):
                messages, wishes = self._with_system(messages), [[None], *wishes]
            text, parts = self._render(messages, tools, wishes, choice)
        self._refuse_far_too_long(text)
        if self.loss_scale.strategy == "all":
            whole = outside(parts, len(text))
            spans = [self.loss_scale.weigh(text, turn.start, turn.end) for turn, _ in whole]
        else:
            spans = [self._weigh(text, turn) for turn, trained in parts if trained]
        return text, [part for span in spans for part in span]

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
        self._check_vocabulary(row.input_ids)
        row.labels[:1] = IGNORE
        if (row.labels == IGNORE).all():
            raise RowError("no token to train")
        return row

    @property
    def may_exceed_vocabulary(self) -> bool:
        """Whether the tokenizer has tokens that the model does not have."""
        highest = max(self.tokenizer.get_vocab().values(), default=0)
        return self.vocab_size is not None and highest >= self.vocab_size

    def _check_vocabulary(self, ids: Array) -> None:
        if self.vocab_size is None or not len(ids) or (highest := int(ids.max())) < self.vocab_size:
            return
        token = self.tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"token {token!r} has the id {highest}, but the model's vocabulary ends at "
            f"{self.vocab_size - 1} (config.json's vocab_size is {self.vocab_size}): add it by "
            "--new_special_tokens, or use the tokenizer that belongs to the model"
        )

    def encode_prompt(
        self, messages: Sequence[Message], tools: str | list[Any] | None = None
    ) -> list[int]:
        """Return the token ids after which the model is to generate the next assistant turn.

        `response_prefix` is appended. Raises RowError if the template refuses the messages.
        """
        chat = to_chat(messages)
        if self._renderer is None:
            text = self._bos() + "".join(message["content"] for message in chat)
        else:
            schemas = parse_tools(tools)
            chat = self._with_system(self._renderer.prepared(chat, schemas))
            text = self._renderer.text(chat, schemas, True)
        return self._tokens.ids(text + (self.response_prefix or ""))

    def _bos(self) -> str:
        return self.tokenizer.bos_token or ""

    def _join(self, messages: list[Message], wanted: list[list[bool]]) -> tuple[str, list[Part]]:
        """Join the texts between BOS and EOS, which belongs to the last one."""
        text, parts = self._bos(), []
        for message, trained in zip(messages, wanted, strict=True):
            start = len(text)
            text += message["content"]
            if message is messages[-1]:
                text += self.tokenizer.eos_token or ""
            parts.append((Turn(start, len(text)), any(trained)))
        return text, parts

    def _render(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        wishes: Wishes,
        choice: Choice,
    ) -> tuple[str, list[Part]]:
        """Return the text, and the messages whose places matter."""
        wanted = choice.wanted(messages, wishes)
        indices = looked_for(choice.strategy, wanted)
        try:
            text, turns = self._located(messages, indices, tools)
            parts = [
                part
                for k, turn in zip(indices, turns, strict=True)
                if choice.strategy == "all" or self._trainable(turn, asked=True in wishes[k])
                for part in divide(messages, k, text, turn, wanted[k], self._renders(tools))
            ]
        except EndlessTemplate:
            raise
        except UserError as error:
            # Either the template rewrites every conversation, or this one holds what it takes
            # for its own markup.
            self._turns(_plain(messages), indices, tools)
            raise RowError("its text confuses the chat template", str(error)) from None
        if choice.strategy == "all":
            generated = messages
        else:
            generated = [
                messages[k] for k, turn in zip(indices, turns, strict=True) if turn.trained
            ]
        self.counts["unshown_reasoning"] += sum(_unshown(each, text) for each in generated)
        eos = self.tokenizer.eos_token
        if eos and not text.rstrip().endswith(self._end_tokens):
            # The template closes turns by opening the next: without this, nothing would teach
            # the model to stop.
            if parts and parts[-1][0].end == len(text):
                last, trained = parts[-1]
                parts[-1] = Turn(last.start, len(text + eos)), trained
            text += eos
        return text, parts

    def _trainable(self, turn: Turn, asked: bool) -> bool:
        """Whether a turn is rendered so that it may be trained; what is not is counted."""
        trainable = turn.trained or asked
        self.counts["context_only_turns"] += not trainable
        return trainable

    def _located(
        self, messages: list[Message], indices: list[int], tools: list[Any] | None
    ) -> tuple[str, list[Turn]]:
        if not indices:
            return self._renders(tools)(messages, False), []
        if tools is None and indices == self._by_strategy(messages):
            text = self._renders(None)(messages, False)
            turns = self._shapes.turns(messages, text)
            if turns is not None:
                return text, turns
        return self._turns(messages, indices, tools)

    def _turns(
        self, messages: list[Message], indices: list[int], tools: list[Any] | None
    ) -> tuple[str, list[Turn]]:
        return find_turns(messages, indices, self._renders(tools), self._end_tokens)

    def _turns_by_strategy(self, messages: list[Message]) -> tuple[str, list[Turn]]:
        return self._turns(messages, self._by_strategy(messages), None)

    def _by_strategy(self, messages: list[Message]) -> list[int]:
        """The messages whose places matter where these say nothing of that."""
        strategy = self.loss_scale.strategy
        return looked_for(strategy, Choice(strategy).wanted(messages, [[None]] * len(messages)))

    def _renders(self, tools: list[Any] | None) -> Render:
        renderer = self._renderer
        assert renderer is not None
        return lambda part, prompt: renderer.text(part, tools, prompt)

    def _adds_system(self, messages: list[Message]) -> bool:
        return self.system is not None and messages[0]["role"] != "system"

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if not self._adds_system(messages):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

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


def _unshown(message: Message, text: str) -> bool:
    """Whether a message has thinking beside its content that is not in the text."""
    reasoning = next((message[key] for key in REASONING if key in message), "")
    return reasoning.strip() not in text


def _plain(messages: list[Message]) -> list[Message]:
    """The same conversation with texts that no template treats specially."""
    return [{**message, "content": f"text {k}"} for k, message in enumerate(messages)]
