"""Renders conversations by a chat template, as transformers' `apply_chat_template` does."""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from swiftmeg.data.standard_row import RowError
from swiftmeg.data.template.chat_templates import (
    CHAT_TEMPLATES,
    UPSTREAM_NAMES,
    ChatTemplate,
    find_chat_template,
)
from swiftmeg.data.template.template_limits import (
    MOST_TEXT,
    SECONDS,
    TookTooLong,
    fault_of,
    limited_time,
)
from swiftmeg.data.turns import REASONING, Message
from swiftmeg.errors import UserError

logger = logging.getLogger(__name__)

_ALWAYS = {"role", "content", "tool_calls", "reasoning_content"}


class EndlessTemplate(UserError):
    """A conversation for which the template does not come to an end."""


class ChatRenderer:
    """A tokenizer with a chat template: its own, or the one that `name` says.

    Of several that the tokenizer has, rows with tools take `tool_use`, others `default`, as in
    transformers. Raises UserError if there is none, the tokenizer lacks the template's tokens, or
    the template cannot be compiled or does not end.
    """

    def __init__(self, tokenizer: Any, name: str | None) -> None:
        self.tokenizer = tokenizer
        self.chat = _chat_template(tokenizer, name)
        own = tokenizer.chat_template
        with_tools = isinstance(own, dict) and own.get("default") == self.chat.jinja
        self.tools_jinja = own.get("tool_use", self.chat.jinja) if with_tools else self.chat.jinja
        for jinja in dict.fromkeys([self.chat.jinja, self.tools_jinja]):
            if fault := _fault(_Probe(tokenizer, jinja)):
                raise UserError(f"{_named(name)} {fault}: repair it, or choose another: --template")
        self._reasoning = {key for key in REASONING if _mentions(self.chat.jinja, key)}

    def text(
        self, messages: Sequence[Message], tools: list[Any] | None, generation_prompt: bool
    ) -> str:
        """Return the text of a conversation.

        Raises RowError if the template refuses it, UserError if it does not come to an end.
        """
        try:
            with limited_time():
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    chat_template=self._jinja(tools),
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
        except TookTooLong:
            raise EndlessTemplate(
                f"the chat template takes more than {SECONDS} s for one conversation, and may "
                "never end: repair it, or choose another: --template"
            ) from None
        except Exception as error:  # a template is a program, with all that programs raise
            raise RowError("the chat template refuses the messages", str(error)) from None
        if len(text) > MOST_TEXT:
            raise RowError("the chat template makes too long a text", f"{len(text):,} characters")
        return str(text)

    def prepared(self, messages: Sequence[Message], tools: list[Any] | None) -> list[Message]:
        """Return messages with the keys that the template may show, under the names it knows.

        Raises RowError for tools and calls that it does not even mention.
        """
        if tools and not _mentions(self.tools_jinja, "tools"):
            raise RowError("the chat template does not show tools")
        jinja = self._jinja(tools)
        if "tool_calls" not in jinja and any("tool_calls" in each for each in messages):
            raise RowError("the chat template does not show tool calls")
        return [self._shown(message, jinja) for message in messages]

    def _jinja(self, tools: list[Any] | None) -> str:
        return self.tools_jinja if tools else self.chat.jinja

    def _shown(self, message: Message, jinja: str) -> Message:
        if message.keys() <= {"role", "content"}:
            return message
        shown = {
            key: value for key, value in message.items() if key in _ALWAYS or _mentions(jinja, key)
        }
        if (reasoning := message.get("reasoning_content")) is not None:
            shown |= dict.fromkeys(self._reasoning, reasoning)
        return shown


class _Probe:
    """A template to be tried; equal to others of the same text."""

    def __init__(self, tokenizer: Any, jinja: str) -> None:
        self._tokenizer = tokenizer
        self._jinja = jinja

    def __hash__(self) -> int:
        return hash(self._jinja)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Probe) and self._jinja == other._jinja

    def __call__(self) -> int:
        """Render a question, then a conversation with a system prompt, tools and a call."""
        asked: Message = {"role": "user", "content": "q"}
        function = {"name": "f", "arguments": {"x": 1}}
        calling: Message = {
            "role": "assistant",
            "content": "a",
            "tool_calls": [{"function": function}],
        }
        said: Message = {"role": "assistant", "content": "a"}
        whole = [{"role": "system", "content": "s"}, asked, calling]
        whole += [{"role": "tool", "content": "t"}, said]
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        written = 0
        for messages, known in (([asked], None), ([asked, said], None), (whole, tools)):
            written += len(self._rendered(messages, known, prompt=messages[-1] is asked))
        return written

    def _rendered(self, messages: list[Message], tools: list[Any] | None, prompt: bool) -> str:
        from jinja2 import TemplateSyntaxError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self._jinja,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except (TemplateSyntaxError, MemoryError):
            raise
        except Exception:  # refused; another conversation may not be
            return ""


@lru_cache(maxsize=64)
def _fault(probe: _Probe) -> str | None:
    return fault_of(probe)


def _named(name: str | None) -> str:
    return f"--template {name}: it" if name else "the chat template of the model's tokenizer"


def _mentions(jinja: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", jinja) is not None


def _chat_template(tokenizer: Any, name: str | None) -> ChatTemplate:
    own = tokenizer.chat_template
    several = own if isinstance(own, dict) else {}
    if name in several:
        return ChatTemplate(several[name])
    if name is None or (name in UPSTREAM_NAMES and name not in CHAT_TEMPLATES):
        try:
            jinja = tokenizer.get_chat_template()
        except ValueError:
            found = f"only {', '.join(several)}" if several else "no chat template"
            raise UserError(
                f"the model's tokenizer has {found}: choose one with --template "
                "(for example chatml), or train on plain text with --use_chat_template false"
            ) from None
        if name is not None:
            _check_upstream_name(name, jinja)
        return ChatTemplate(jinja)
    chat = find_chat_template(name)
    missing = [token for token in chat.tokens if token not in tokenizer.added_tokens_encoder]
    if missing:
        raise UserError(
            f"--template {name}: the tokenizer has no token {' '.join(missing)}: add it by "
            "--new_special_tokens, or choose another template"
        )
    return chat


def _check_upstream_name(name: str, jinja: str) -> None:
    """UserError unless the tokenizer's own template is of the family that upstream calls `name`."""
    missing = [mark for mark in UPSTREAM_NAMES[name] if mark not in jinja]
    if missing:
        raise UserError(
            f"--template {name}: the tokenizer's own chat template is another: it writes no "
            f"{' '.join(missing)}; drop the flag to use it, or choose one of "
            f"{', '.join(CHAT_TEMPLATES)}, or a .jinja file"
        )
    logger.info("--template %s: taken as the tokenizer's own chat template", name)
