"""Files of every kind and packing give the same rows; those that cannot be told apart stop."""

import csv
import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from swiftmeg.data.sources import subset_reader
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.stream.stream import RowStream
from swiftmeg.errors import UserError

ROWS = [{"query": f"q {index}, été", "response": f'"{index}"\nline'} for index in range(2500)]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def text_of(kind):
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "json":
        return json.dumps(ROWS)
    import io

    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["query", "response"])
    writer.writeheader()
    writer.writerows(ROWS)
    return buffer.getvalue()


def pack(data, packing):
    if packing == "gz":
        return gzip.compress(data)
    if packing == "zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return data


def loaded(spec):
    rows, _ = load_rows([spec], dataset_shuffle=False)
    return [tuple(message["content"] for message in messages) for messages in rows["messages"]]


EXPECTED = [(row["query"], row["response"]) for row in ROWS]


@pytest.mark.parametrize("packing", ["", "gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_packed_text(tmp_path, kind, packing):
    name = f"rows.{kind}" + (f".{packing}" if packing else "")
    data = pack(text_of(kind).encode(), packing)
    (tmp_path / name).write_bytes(data)
    assert loaded(name) == EXPECTED
    stream = RowStream([name], shuffle_buffer_size=0)
    assert [stream.standard(row)["messages"][0]["content"] for row in stream.epoch(0)] == [
        query for query, _ in EXPECTED
    ]
    if packing:
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            loaded(name)


def test_what_datasets_saves(tmp_path):
    Dataset.from_list(ROWS).save_to_disk("plain")
    assert loaded("plain") == EXPECTED
    both = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:3])})
    both.save_to_disk("both")
    assert loaded("both") == EXPECTED
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert loaded("file.arrow") == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_utf_16_is_named_as_such(tmp_path, kind, encoding):
    (tmp_path / f"rows.{kind}").write_bytes(text_of(kind).encode(encoding))
    with pytest.raises(UserError, match=rf"rows\.{kind}: is UTF-16 or UTF-32, not UTF-8: convert"):
        loaded(f"rows.{kind}")


@pytest.mark.parametrize(
    "rest",
    ["", '3,"fine"\n4,"fine"\n', '3,fi"ne\n', "3,fine\n" * 20_000, '3,"a, b"\n5,"x ""y"" z"\n'],
)
def test_an_open_quote_swallows_nothing(tmp_path, rest):
    (tmp_path / "a.csv").write_text('query,response\n1,fine\n2,"open\n' + rest)
    with pytest.raises(
        UserError, match=r"a\.csv: is not CSV .* quote that opens in the row of line 3 "
    ):
        loaded("a.csv")


def test_quotes_that_are_closed_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('query,response\n1,"a ""b"",\nc"\n2,5" nail\n')
    assert loaded("a.csv") == [("1", 'a "b",\nc'), ("2", '5" nail')]


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_changed_file_of_the_same_size_and_time_is_read_anew(tmp_path, monkeypatch, kind, limit):
    if limit is not None:
        monkeypatch.setattr(subset_reader, "HASHED_WHOLE", limit)
    path = tmp_path / f"rows.{kind}"

    def write(answer):
        rows = [{"query": "q", "response": answer}] * 50
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(path, ns=(10**18, 10**18))
        return path.stat().st_size

    size = write("old")
    assert loaded(path.name)[0] == ("q", "old")
    assert write("new") == size
    assert loaded(path.name)[0] == ("q", "new")


def test_an_unchanged_file_is_read_once(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text(text_of("jsonl"))
    loaded("rows.jsonl")
    folders = sorted((tmp_path / "cache" / "rows").iterdir())
    os.utime(path)  # content decides
    loaded("rows.jsonl")
    assert sorted((tmp_path / "cache" / "rows").iterdir()) == folders


SCRIPT = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if sys.argv[1] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from swiftmeg.data.sources.load import load_rows
from swiftmeg.errors import UserError
try:
    load_rows(["rows.jsonl"])
except UserError as error:
    print("error:", error)
"""


@pytest.mark.parametrize(
    ("cache", "limit", "message"),
    [
        ("a-file", "0", "SWIFTMEG_CACHE"),
        ("a-file/below", "0", "SWIFTMEG_CACHE"),
        ("/proc/nowhere", "0", "SWIFTMEG_CACHE"),
        ("good", "20000", "SWIFTMEG_CACHE"),
    ],
)
def test_a_cache_that_takes_nothing_ends_in_one_line(tmp_path, cache, limit, message):
    (tmp_path / "a-file").write_text("x")
    (tmp_path / "rows.jsonl").write_text(text_of("jsonl"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, limit],
        env={**os.environ, "SWIFTMEG_CACHE": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert str(tmp_path) in line or cache in line
    left = list((tmp_path / "good").rglob("*.tmp-*")) if cache == "good" else []
    assert not left
