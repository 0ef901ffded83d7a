"""Bring rows of the usual fine-tuning formats into the standard form (`ROW_SCHEMA`).

The format is told by a row's columns: `messages` or `conversation(s)`; `instruction` with `input`
(Alpaca); otherwise a query and a response with their aliases, of which the query may be missing
for pre-training text.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swiftmeg.data.sources.messages import (
    GENERATED,
    as_json,
    as_text,
    first_value,
    parse_cell,
    standard_messages,
)
from swiftmeg.data.standard_row import Row, RowError
from swiftmeg.data.tools import check_answered, parse_tools, to_chat
from swiftmeg.errors import UserError

MESSAGES = ("messages", "conversation", "conversations")
_SYSTEM = ("system", "system_prompt")
_QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
_RESPONSE = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution"),
    *("text", "completion", "content"),
)
_MEDIA = ("images", "videos", "audios", "objects", "rejected_images")
Chooser = Callable[[], random.Random]


@dataclass(frozen=True)
class Identity:
    """What `{{NAME}}` and `{{AUTHOR}}` stand for in self-cognition data.

    Each is a list of one value, or of a Chinese and an English one; None if not given.
    """

    names: tuple[str, ...] | None = None
    authors: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for flag, values in (("--model_name", self.names), ("--model_author", self.authors)):
            if values is not None and len(values) not in (1, 2):
                raise UserError(
                    f"{flag} {' '.join(values)}: {len(values)} values; accepted: one, or a "
                    "Chinese and an English one"
                )

    def fill(self, row: Row) -> Row:
        """Replace the placeholders in a row that has a `tag`, `zh` or `en`; leave other rows.

        Raises UserError if a placeholder has no value.
        """
        if "tag" not in row:
            return row
        language = 0 if row["tag"] == "zh" else -1
        filled = dict(row)
        for placeholder, flag, values in (
            ("{{NAME}}", "--model_name", self.names),
            ("{{AUTHOR}}", "--model_author", self.authors),
        ):
            for name in (*_QUERY, *_RESPONSE):
                text = filled.get(name)
                if isinstance(text, str) and placeholder in text:
                    if not values:
                        raise UserError(
                            f"the data holds the placeholder {placeholder}: give {flag} (one "
                            "value, or a Chinese and an English one); self-cognition data needs "
                            "both --model_name and --model_author"
                        )
                    filled[name] = text.replace(placeholder, values[language])
        return filled


def standard_row(
    row: Mapping[str, Any],
    chooser: Chooser,
    for_training: bool = False,
    unread: Counter[str] | None = None,
) -> Row:
    """Return `row` in standard form, without `origin`; columns that it does not use are left out.

    Keys of messages that are not used are counted in `unread`. What `chooser` returns picks one of
    several responses. Raises RowError for a row that cannot be used, which `for_training` includes
    one that does not end with the assistant's turn; otherwise a question needs no response.
    """
    unread = Counter() if unread is None else unread
    for column in _MEDIA:
        if row.get(column):
            raise RowError(f"{column} are not supported: only text is trained")
    conversation = next((name for name in MESSAGES if row.get(name) is not None), None)
    if conversation is not None:
        messages = standard_messages(row[conversation], conversation, unread)
    elif _conversational(row.get("prompt")) or _conversational(row.get("completion")):
        messages = _prompt_completion(row, chooser, for_training, unread)
    else:
        messages = _query_response(row, chooser, for_training)
    system = first_value(row, _SYSTEM)
    if system is not None and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": as_text(system, "system")})
    if for_training:
        check_answered(to_chat(messages))
    standard: Row = {"messages": messages}
    if row.get("tools"):
        tools = row["tools"]
        standard["tools"] = as_text(tools if isinstance(tools, str) else as_json(tools), "tools")
        parse_tools(standard["tools"])
    if row.get("rejected_response") is not None:
        standard["rejected_response"] = as_text(row["rejected_response"], "rejected_response")
    if row.get("rejected_messages") is not None:
        standard["rejected_messages"] = standard_messages(
            row["rejected_messages"], "rejected_messages", unread
        )
    # These are common names: values of other kinds mean something else.
    if isinstance(row.get("label"), bool):
        standard["label"] = row["label"]
    if isinstance(row.get("channel"), str):
        standard["channel"] = as_text(row["channel"], "channel")
    if isinstance(row.get("margin"), int | float):
        standard["margin"] = _margin(row["margin"])
    return standard


def _margin(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise RowError("margin is too large") from None


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """Return `row` with each column renamed as `columns` says; a new name wins over an old one."""
    renamed = {name: value for name, value in row.items() if name not in columns}
    renamed.update({columns[name]: row[name] for name in row if name in columns})
    return renamed


def _conversational(value: Any) -> bool:
    """Whether a column holds messages rather than a text, or a choice of texts."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _prompt_completion(
    row: Mapping[str, Any], chooser: Chooser, needs_response: bool, unread: Counter[str]
) -> list[Row]:
    """Join TRL's two columns of messages; what the assistant says in the prompt is not trained."""
    texts = {name: value for name, value in row.items() if not _conversational(value)}
    if _conversational(row.get("prompt")):
        prompt = [
            {"loss": False, **message} if message["role"] in GENERATED else message
            for message in standard_messages(row["prompt"], "prompt", unread)
        ]
    else:
        asked = first_value(texts, _QUERY)
        prompt = [{"role": "user", "content": _written(asked, "query")}] if asked else []
    if _conversational(row.get("completion")):
        return [*prompt, *standard_messages(row["completion"], "completion", unread)]
    response = _chosen(first_value(texts, _RESPONSE), chooser)
    if response is None:
        if needs_response:
            raise RowError("the response is empty")
        return prompt
    return [*prompt, {"role": "assistant", "content": _written(response, "response")}]


def _chosen(response: Any, chooser: Chooser) -> Any:
    """One of several responses, or the only one."""
    if not isinstance(response, list):
        return response
    if not response:
        raise RowError("the response is empty")
    return chooser().choice(response)


def _written(value: Any, what: str) -> str:
    """A text, or a number as it is written."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowError(f"{what} is not a finite number")
        return str(value)
    return as_text(value, what)


def _query_response(row: Mapping[str, Any], chooser: Chooser, needs_response: bool) -> list[Row]:
    response = first_value(row, _RESPONSE)
    asks = any(row.get(name) for name in _QUERY)
    if response is None and (needs_response or not asks):
        if not any(name in row for name in _RESPONSE):
            raise RowError("no known column", f"the columns are {', '.join(map(str, row))}")
        raise RowError("the response is empty")
    given, response = response, _chosen(response, chooser)
    if given is not None and response is None:
        raise RowError("response is not text")
    messages = []
    for query, answer in _history(row.get("history")):
        messages.append({"role": "user", "content": _written(query, "history")})
        messages.append({"role": "assistant", "content": _written(answer, "history")})
    if "instruction" in row and "input" in row:
        parts = [as_text(row[name] or "", name) for name in ("instruction", "input")]
        query = "\n".join(part for part in parts if part)
    else:
        query = first_value(row, _QUERY)
    if query is not None:
        messages.append({"role": "user", "content": _written(query, "query")})
    elif messages or any(name in row for name in _QUERY):
        raise RowError("the query is empty")
    if response is not None:
        text = _written(response, "response") if messages else as_text(response, "response")
        messages.append({"role": "assistant", "content": text})
    return messages


def _history(history: Any) -> Sequence[tuple[Any, Any]]:
    if isinstance(history, str):
        history = parse_cell(history, "history")
    if not history:
        return []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise RowError("history is not a list of pairs")
    return list(history)
