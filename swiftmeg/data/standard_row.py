"""The standard row, the error of a single bad row, and the account of dropped rows."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

Row = dict[str, Any]

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

ROW_SCHEMA = pa.schema(
    [
        ("messages", _MESSAGES),
        ("tools", pa.string()),
        ("rejected_response", pa.string()),
        ("rejected_messages", _MESSAGES),
        ("label", pa.bool_()),
        ("channel", pa.string()),
        ("margin", pa.float64()),
        ("origin", pa.string()),
    ]
)
"""A row in standard form. `tools` is JSON text, because Arrow would merge the fields of unlike
tool schemas; `origin` is where the row came from, such as `train.jsonl:17`, for error messages."""


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


def _dicts(columns: dict[str, list[Any]]) -> list[Row]:
    values = zip(*columns.values(), strict=True)
    return [dict(zip(columns, each, strict=True)) for each in values]


class RowError(Exception):
    """One row cannot be used. `reason` is a fixed phrase to count by, `detail` what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class RowTooLong(RowError):
    """A row over `--max_length` under `--truncation_strategy delete`: dropped even if strict."""


@dataclass
class Drops:
    """How many rows were dropped, by reason, with the first example of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

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
        for reason, example in other.examples.items():
            self.examples.setdefault(reason, example)

    def __str__(self) -> str:
        parts = [
            f"{count} x {reason} (first: {self.examples[reason]})"
            for reason, count in self.counts.most_common()
        ]
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "examples": self.examples}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Drops":
        return cls(Counter(value["counts"]), dict(value["examples"]))
