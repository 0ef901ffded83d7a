"""Rows of Arrow tables as the objects that they were made of.

Arrow gives every object of a column the keys of all others: a tool's parameters seem to have the
parameters of every tool, all null. Such keys are left out. A key whose values are null in the whole
column was in some object, and nothing tells in which: it stays where its object is.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from swiftmeg.data.standard_row import Row, RowError, not_utf8


def batch_rows(batch: pa.RecordBatch) -> Iterator[Row | RowError]:
    """Yield the rows of a batch; an error for one whose text is not UTF-8."""
    types = nested_types(batch.schema)
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(len(batch)):
            try:
                row = batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield not_utf8(error)
            else:
                yield without_filling(row, types)
    else:
        for row in rows:
            yield without_filling(row, types)


def nested_types(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return the types of the columns that hold objects or lists."""
    return {field.name: field.type for field in schema if pa.types.is_nested(field.type)}


def without_filling(row: Row, types: Mapping[str, pa.DataType]) -> Row:
    """Return a row without the keys that Arrow has filled in, in the columns of `types`."""
    if not types:
        return row
    return {
        name: _present(value, types[name]) if name in types else value
        for name, value in row.items()
    }


def _present(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return {
            key: _present(each, fields[key])
            for key, each in value.items()
            if each is not None or pa.types.is_null(fields[key])
        }
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_present(each, kind.value_type) for each in value]
    if pa.types.is_map(kind):
        return {key: _present(each, kind.item_type) for key, each in value}
    return value
