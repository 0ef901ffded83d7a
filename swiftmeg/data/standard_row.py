"""The standard row, the error of a single bad row, and the account of dropped rows."""

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

Row = dict[str, Any]

_NAMED = 8
"""Keys that are named before the others are only counted."""

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

_EXTRAS = {"messages": "message_extras", "rejected_messages": "rejected_extras"}

ROW_SCHEMA = pa.schema(
    [
        ("messages", _MESSAGES),
        ("message_extras", pa.list_(pa.string())),
        ("tools", pa.string()),
        ("rejected_response", pa.string()),
        ("rejected_messages", _MESSAGES),
        ("rejected_extras", pa.list_(pa.string())),
        ("label", pa.bool_()),
        ("channel", pa.string()),
        ("margin", pa.float64()),
        ("origin", pa.string()),
    ]
)
"""A row in standard form. `tools` is JSON text, because Arrow would merge the fields of unlike
tool schemas; `origin` is where the row came from, such as `train.jsonl:17`, for error messages.

A message may have more than a role and content: `loss` says whether it is trained, whatever
--loss_scale says; other keys are for the chat template. In a table these are JSON objects, one a
message or null, in the column of extras; that is null where no message of the row has any."""


def to_columns(row: Row) -> Row:
    """Return a standard row as ROW_SCHEMA has it."""
    columns = dict(row)
    for name, extras_name in _EXTRAS.items():
        extras = [_extra(message) for message in row.get(name) or []]
        if any(extras):
            columns[extras_name] = extras
    return columns


def _extra(message: Row) -> str | None:
    extra = {key: message[key] for key in message if key not in ("role", "content")}
    return json.dumps(extra, ensure_ascii=False) if extra else None


def messages_of(row: Row, name: str = "messages") -> list[Row]:
    """Return the messages of a row, whether it was in a table or not, with their extras."""
    extras = row.get(_EXTRAS[name])
    if extras is None:
        return list(row[name])
    return [
        {**message, **json.loads(extra)} if extra else message
        for message, extra in zip(row[name], extras, strict=True)
    ]


def plain_rows(table: pa.Table) -> list[Row]:
    """Return a table of standard rows as dicts; faster than pyarrow's `to_pylist`."""
    columns: dict[str, list[Any]] = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        columns[name] = _conversations(column) if name == "messages" else column.to_pylist()
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _conversations(column: pa.ListArray) -> list[list[Row]]:
    if column.null_count:
        return list(column.to_pylist())
    flat = column.flatten()
    fields = {field.name: flat.field(field.name).to_pylist() for field in flat.type}
    messages = iter(
        [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    )
    return [list(islice(messages, size)) for size in column.value_lengths().to_pylist()]


class RowError(Exception):
    """One row cannot be used. `reason` is a fixed phrase to count by, `detail` what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def not_utf8(error: UnicodeDecodeError) -> RowError:
    """The error of a row that holds such bytes."""
    return RowError("not UTF-8", f"byte {error.object[error.start]:#x} at {error.start}")


class RowTooLong(RowError):
    """A row over `--max_length` under `--truncation_strategy delete`: dropped even if strict."""


@dataclass
class Drops:
    """How many rows were dropped, by reason, with the first example of each reason; and in how many
    messages nothing reads a key."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, origin: str, error: RowError) -> None:
        self.counts[error.reason] += 1
        detail = f", {error.detail}" if error.detail else ""
        self.examples.setdefault(error.reason, f"{origin}{detail}")

    def merge(self, other: "Drops") -> None:
        """Add `other`, whose rows come after those counted so far."""
        self.counts.update(other.counts)
        self.unread.update(other.unread)
        for reason, example in other.examples.items():
            self.examples.setdefault(reason, example)

    def __str__(self) -> str:
        parts = [
            f"{count} x {reason} (first: {self.examples[reason]})"
            for reason, count in self.counts.most_common()
        ]
        return "; ".join(parts)

    def unread_keys(self) -> str:
        """Name the keys of messages that nothing reads; empty if there are none."""
        if not self.unread:
            return ""
        common = self.unread.most_common(_NAMED)
        named = [f"{key} (in {count:,})" for key, count in common]
        more = len(self.unread) - len(common)
        others = f" and {more:,} others" if more else ""
        return f"keys of messages that are not read: {', '.join(named)}{others}"

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "examples": self.examples,
            "unread": dict(self.unread),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Drops":
        unread = Counter[str](value.get("unread", {}))
        return cls(Counter(value["counts"]), dict(value["examples"]), unread)
