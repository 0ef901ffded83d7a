"""Renders conversations by a chat template, as transformers' `apply_chat_template` does."""

import re
from collections.abc import Sequence
from typing import Any

from swiftmeg.data.standard_row import RowError
from swiftmeg.data.template.chat_templates import ChatTemplate, find_chat_template
from swiftmeg.data.turns import REASONING, Message
from swiftmeg.errors import UserError

_ALWAYS = {"role", "content", "tool_calls", "reasoning_content"}


class ChatRenderer:
    """A tokenizer with a chat template: its own, or the one that `name` says.

    Raises UserError if there is none, or the tokenizer lacks the template's tokens.
    """

    def __init__(self, tokenizer: Any, name: str | None) -> None:
        self.tokenizer = tokenizer
        self.chat = _chat_template(tokenizer, name)
        self._reasoning = {key for key in REASONING if _mentions(self.chat.jinja, key)}

    def text(
        self, messages: Sequence[Message], tools: list[Any] | None, generation_prompt: bool
    ) -> str:
        """Return the text of a conversation; raises RowError if the template refuses it."""
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

    def prepared(self, messages: Sequence[Message], tools: list[Any] | None) -> list[Message]:
        """Return messages with the keys that the template may show, under the names it knows.

        Raises RowError for tools and calls that it does not even mention.
        """
        if tools and not _mentions(self.chat.jinja, "tools"):
            raise RowError("the chat template does not show tools")
        if "tool_calls" not in self.chat.jinja and any("tool_calls" in each for each in messages):
            raise RowError("the chat template does not show tool calls")
        return [self._shown(message) for message in messages]

    def _shown(self, message: Message) -> Message:
        if message.keys() <= {"role", "content"}:
            return message
        shown = {
            key: value
            for key, value in message.items()
            if key in _ALWAYS or _mentions(self.chat.jinja, key)
        }
        if (reasoning := message.get("reasoning_content")) is not None:
            shown |= dict.fromkeys(self._reasoning, reasoning)
        return shown


def _mentions(jinja: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", jinja) is not None


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
