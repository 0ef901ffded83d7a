"""Tools and their calls: from the text that standard rows hold to what chat templates know."""

import json
from collections.abc import Sequence
from typing import Any

from swiftmeg.data.standard_row import RowError
from swiftmeg.data.turns import Message

_CALLING = ("assistant", "tool_call")


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
    return [_with_type(tool) for tool in tools]


def _with_type(tool: dict[str, Any]) -> dict[str, Any]:
    """A schema in the form that templates know, also where it is the bare function."""
    kind = tool.get("type", "function")
    if kind != "function" or "function" in tool:
        return {"type": kind, **tool}
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": kind, "function": function}


def to_chat(messages: Sequence[Message]) -> list[Message]:
    """Bring standard messages into the form that chat templates know.

    Consecutive `tool_call` messages (JSON text with name and arguments) become the `tool_calls`
    of one assistant message, and `tool_response` becomes the role `tool`. Raises RowError.
    """
    return [_chat_message(parts) for parts in _grouped(messages)]


def loss_wishes(messages: Sequence[Message]) -> list[list[bool | None]]:
    """Return for each message of `to_chat` whether its parts are to be trained, where that is said.

    The parts are its text, unless it consists of calls alone, and its tool calls.
    """
    return [[part.get("loss") for part in parts] for parts in _grouped(messages)]


def _grouped(messages: Sequence[Message]) -> list[list[Message]]:
    """Put tool calls to each other, and to the assistant's text before them."""
    groups: list[list[Message]] = []
    for message in messages:
        if message["role"] == "tool_call" and groups and groups[-1][0]["role"] in _CALLING:
            groups[-1].append(message)
        else:
            groups.append([message])
    return groups


def _chat_message(parts: Sequence[Message]) -> Message:
    first = parts[0]
    role = {"tool_call": "assistant", "tool_response": "tool"}.get(first["role"], first["role"])
    if first["role"] == "tool_call":
        return {"role": role, "content": "", "tool_calls": [_tool_call(part) for part in parts]}
    message = {"role": role, "content": first["content"], **_extra(first)}
    if len(parts) > 1:
        message["tool_calls"] = [_tool_call(part) for part in parts[1:]]
    return message


def _extra(message: Message) -> Message:
    """What a standard message holds beside role and content for the template."""
    known = ("role", "content", "loss")
    return {k: v for k, v in message.items() if k not in known and v is not None}


def check_answered(chat: Sequence[Message]) -> None:
    """RowError unless a conversation in that form ends with the assistant's turn."""
    if not any(message["role"] == "assistant" for message in chat):
        raise RowError("no assistant turn")
    if chat[-1]["role"] != "assistant":
        raise RowError("the last message is not the assistant's", chat[-1]["role"])


def _tool_call(message: Message) -> dict[str, Any]:
    content = message["content"]
    try:
        call = json.loads(content)
        arguments = call.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        function = {"name": call["name"], "arguments": arguments}
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise RowError("tool_call is not JSON with name and arguments", content[:80]) from None
    return {**_extra(message), "type": "function", "function": function}
