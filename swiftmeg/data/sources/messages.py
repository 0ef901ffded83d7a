"""Messages of the usual formats, in the form of standard rows."""

import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from swiftmeg.data.standard_row import Row, RowError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "tool_call": "tool_call",
    "function_call": "tool_call",
    "tool_response": "tool_response",
    "observation": "tool_response",
    "tool": "tool",
}

_REASONING = ("reasoning_content", "reasoning", "thinking")
"""What the thinking that led to a message's content is called."""

_SHOWN_AS_THEY_ARE = ("name", "tool_call_id")

GENERATED = ("assistant", "tool_call")

_KNOWN = {
    *("role", "from", "content", "value", "tool_calls", "function_call", "loss"),
    *(*_REASONING, *_SHOWN_AS_THEY_ARE),
}


def standard_messages(value: Any, column: str, unread: Counter[str]) -> list[Row]:
    """Return messages of one role and text each, of those in `column`.

    Keys that nothing reads are counted in `unread`. Raises RowError.
    """
    if isinstance(value, str):
        value = parse_cell(value, column)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{column} is not a list of objects")
    messages: list[Row] = []
    for item in value:
        messages += _message(item, unread)
    if not messages:
        raise RowError(f"{column} is empty")
    return messages


def _message(item: Row, unread: Counter[str]) -> list[Row]:
    if "role" not in item and "from" not in item:
        return _pair(item)
    role = first_value(item, ("role", "from"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowError("unknown role", f"{str(role)[:40]}; accepted: {', '.join(ROLES)}")
    known = _KNOWN | ({"weight"} if ROLES[role] in GENERATED else set())
    unread.update(str(key) for key in item if key not in known and item[key] not in (None, "", []))
    content, calls, extra = first_value(item, ("content", "value")), _calls(item), _extra(item)
    if content is None and not calls and not extra:
        raise RowError("a message has no content", f"role {role}")
    messages = []
    if content or extra or not calls:
        text = as_text("" if content is None else content, "content")
        messages.append({"role": ROLES[role], "content": text, **extra})
    messages += calls
    if (loss := _loss(item, ROLES[role])) is not None:
        messages = [{**message, "loss": loss} for message in messages]
    return messages


def _calls(item: Row) -> list[Row]:
    """The calls of a message as messages of their own; an id goes with each."""
    calls = item.get("tool_calls") or item.get("function_call") or []
    calls = [calls] if isinstance(calls, dict) else calls
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RowError("tool_calls is not a list of objects")
    return [
        {"role": "tool_call", "content": as_json(call.get("function", call)), **ids}
        for call in calls
        for ids in [{"id": call["id"]} if isinstance(call.get("id"), str) else {}]
    ]


def _extra(item: Row) -> Row:
    """What a template may show beside the content."""
    reasoning = first_value(item, _REASONING)
    extra = {} if not reasoning else {"reasoning_content": as_text(reasoning, "reasoning_content")}
    for key in _SHOWN_AS_THEY_ARE:
        if item.get(key) is not None:
            extra[key] = as_text(item[key], key)
    return extra


def _loss(item: Row, role: str) -> bool | None:
    """Whether a message says that it is trained, or is not: `loss`, or OpenAI's `weight`, which
    only what the assistant says has."""
    wishes = set()
    for key in ("loss", "weight") if role in GENERATED else ("loss",):
        if (value := item.get(key)) is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"{key} of a message is neither 0 nor 1", str(value)[:40])
        wishes.add(bool(value))
    if len(wishes) == 2:
        raise RowError("loss and weight of a message contradict each other")
    return wishes.pop() if wishes else None


def _pair(item: Row) -> list[Row]:
    """Return the two messages of a ShareGPT round such as {"human": .., "assistant": ..}."""
    messages = [
        {"role": ROLES[key], "content": as_text(item[key], key)}
        for role in ("user", "assistant")
        for key in item
        if ROLES.get(key) == role
    ]
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise RowError("a message has neither role and content nor human and assistant")
    return messages


def as_text(value: Any, what: str) -> str:
    """Return a text, or the parts of one joined; raises RowError for anything else."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        other = [part.get("type") for part in value if part.get("type") != "text"]
        if other:
            raise RowError("content of other kinds than text is not supported", str(other[0]))
        parts = [part.get("text", "") for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f"{what} is not text", "a part has no text")
        value = "".join(parts)
    if not isinstance(value, str):
        raise RowError(f"{what} is not text", type(value).__name__)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{what} holds half of a surrogate pair") from None
    return value


def first_value(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first value under `names` that is not null, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def parse_cell(text: str, column: str) -> Any:
    """Parse a structured value from a CSV cell: JSON, or as Python writes lists and dicts."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise RowError(f"{column} is neither JSON nor a list", text[:60]) from None


def as_json(value: Any) -> str:
    """Return JSON text; raises RowError where it is nested too deeply."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        raise RowError("nested too deeply") from None
