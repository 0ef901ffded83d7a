"""Tools and their calls: from the text that standard rows hold to what chat templates know."""

import json
from collections.abc import Sequence
from typing import Any

from swiftmeg.data.standard_row import RowError
from swiftmeg.data.turns import Message


def parse_tools(tools: str | list[Any] | None) -> list[Any] | None:
    """Parse the `tools` column: JSON text of a list of tool schemas. Raises RowError."""
    if not tools:
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowError("tools is not JSON", str(error)) from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is not a JSON list of objects")
    return tools


def to_chat(messages: Sequence[Message]) -> list[Message]:
    """Bring standard messages into the form that chat templates know.

    Consecutive `tool_call` messages (JSON text with name and arguments) become the `tool_calls`
    of one assistant message, and `tool_response` becomes the role `tool`. Raises RowError.
    """
    chat: list[Message] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool_call":
            if not chat or chat[-1]["role"] != "assistant":
                chat.append({"role": "assistant", "content": ""})
            chat[-1].setdefault("tool_calls", []).append(_tool_call(content))
        else:
            role = "tool" if role == "tool_response" else role
            chat.append({"role": role, "content": content})
    return chat


def check_answered(chat: Sequence[Message]) -> None:
    """RowError unless a conversation in that form ends with the assistant's turn."""
    if not any(message["role"] == "assistant" for message in chat):
        raise RowError("no assistant turn")
    if chat[-1]["role"] != "assistant":
        raise RowError("the last message is not the assistant's", chat[-1]["role"])


def _tool_call(content: str) -> dict[str, Any]:
    try:
        call = json.loads(content)
        arguments = call.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        function = {"name": call["name"], "arguments": arguments}
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise RowError("tool_call is not JSON with name and arguments", content[:80]) from None
    return {"type": "function", "function": function}
