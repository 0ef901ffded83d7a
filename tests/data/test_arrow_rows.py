"""Rows of Parquet files against the same rows as JSON lines."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from swiftmeg.data.sources import hubs
from swiftmeg.data.sources.load import load_rows


def tool(name, properties, **keys):
    parameters = {"type": "object", "properties": properties, **keys}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def called(name, arguments):
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": function}],
    }


USER = {"role": "user", "content": "q"}

ROWS = [
    {
        "tools": [
            tool(
                "weather", {"city": {"type": "string"}, "days": {"type": "integer", "default": 3}}
            ),
            tool("time", {"zone": {"type": "string", "enum": ["UTC", "CET"]}}, required=["zone"]),
        ],
        "messages": [USER, called("weather", {"city": "Paris", "days": 2})],
    },
    {
        "tools": [tool("search", {"query": {"type": "string", "default": None}})],
        "messages": [USER, called("search", {"query": "x", "filters": {"lang": ["fr"]}})],
    },
    {"tools": [tool("none", {})], "messages": [USER, called("none", {})]},
    {"messages": [USER, {"role": "assistant", "content": "a"}]},
]


def contents(rows):
    return [
        [json.loads(row["tools"] or "null")]
        + [json.loads(m["content"]) for m in row["messages"] if m["role"] == "tool_call"]
        for row in rows
    ]


@pytest.fixture
def expected(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return contents(load_rows([str(path)], dataset_shuffle=False)[0])


def test_objects_have_their_own_keys(tmp_path, expected):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert contents(load_rows([str(path)], dataset_shuffle=False)[0]) == expected
    assert expected[1][0][0]["function"]["parameters"]["properties"]["query"] == {
        "type": "string",
        "default": None,
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_fills_keys_in_as_well(monkeypatch, expected, streaming):
    loaded = Dataset.from_list(ROWS)
    if streaming:
        loaded = loaded.to_iterable_dataset()
    monkeypatch.setattr(hubs, "_from_modelscope", lambda *_: loaded)
    found, _ = load_rows(["me/tools"], dataset_shuffle=False, load_from_cache_file=False)
    assert contents(found) == expected


def test_json_text_in_a_column_stays_as_it_is(tmp_path):
    tools = json.dumps([tool("f", {"x": {"default": None, "type": "string"}})])
    rows = [{"tools": tools, "messages": [USER, {"role": "assistant", "content": "a"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    loaded, _ = load_rows([str(tmp_path / "rows.parquet")])
    assert loaded[0]["tools"] == tools
