"""Ten thousand rows with every kind of damage: exact counts, or a stop at the first."""

import json
import logging
import random
import re

import pytest

from swiftmeg.data.encoded.encode import encode_rows
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.sources.readers import LINE_LIMIT
from swiftmeg.data.template.template import Template
from swiftmeg.errors import UserError

ROWS = 10_000
LONG = "longer than --max_length 400"


def chat(answer, **columns):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **columns}


def line(value):
    return json.dumps(value).encode()


def nested(depth):
    return b'{"text": ' + b"[" * depth + b"]" * depth + b"}"


def call(content):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "tool_call", **content}]}


DAMAGE = {
    # Bytes.
    b'{"text": "\xff\xfe"}': "not UTF-8",
    b'{"text": "\xe4\xbd"}': "not UTF-8",
    b'{"text": "\xed\xa0\x80"}': "not UTF-8",
    b"\x00\x00\x00\x00": "not JSON",
    b'{"text": "x" * LINE_LIMIT}'.replace(b"x", b"y"): "not JSON",
    b'{"text": "' + b"x " * 2_000_000 + b'"}': LONG,
    b'{"text": "' + b"x" * LINE_LIMIT + b'"}': "longer than 32 MiB",
    # JSON.
    b'{"text": "cut off': "not JSON",
    b"{'text': 'python'}": "not JSON",
    b'{"text": "x"},': "not JSON",
    b'{"text": "tab\there"}': "not JSON",
    b'{"text": ' + b"9" * 5000 + b"}": "not JSON",
    b'{"text": "a", "text": "b"}': "a key is given twice",
    b'{"messages": [{"role": "user", "role": "user", "content": "x"}]}': "a key is given twice",
    nested(100_000): "nested too deeply",
    nested(50): "response is not text",
    b"null": "not a JSON object",
    b'"text"': "not a JSON object",
    b'[{"text": "x"}]': "not a JSON object",
    b"17": "not a JSON object",
    b"{}": "no known column",
    # Nulls.
    b'{"text": null}': "the response is empty",
    b'{"messages": null}': "no known column",
    b'{"messages": []}': "messages is empty",
    b'{"messages": [null]}': "messages is not a list of objects",
    line({"messages": [{"role": "user", "content": None}]}): "a message has no content",
    line({"query": None, "response": "x"}): "the query is empty",
    # Wrong types.
    line({"messages": 3}): "messages is not a list of objects",
    line({"messages": "[{"}): "messages is neither JSON nor a list",
    line({"messages": {"role": "user"}}): "messages is not a list of objects",
    line({"messages": [["user", "x"]]}): "messages is not a list of objects",
    line({"messages": [{"role": ["user"], "content": "x"}]}): "unknown role",
    line({"messages": [{"role": 1, "content": "x"}]}): "unknown role",
    line({"messages": [{"role": "narrator", "content": "x"}]}): "unknown role",
    line({"messages": [{"text": "x"}]}): (
        "a message has neither role and content nor human and assistant"
    ),
    line(chat(5)): "content is not text",
    line(chat({"a": 1})): "content is not text",
    line(chat([{"type": "text", "text": None}])): "content is not text",
    line(chat([{"type": "image"}])): "content of other kinds than text is not supported",
    line({"query": ["q"], "response": "x"}): "query is not text",
    line({"text": {"deep": [1]}}): "response is not text",
    line({"query": "q", "response": [None]}): "response is not text",
    line({"text": "\ud800"}): "response holds half of a surrogate pair",
    line({"query": "q", "response": "x", "history": 5}): "history is not a list of pairs",
    line({"query": "q", "response": "x", "history": [["a"]]}): "history is not a list of pairs",
    line(chat("x", system=7)): "system is not text",
    line(chat("x", tools=7)): "tools is not a JSON list of objects",
    line(chat("x", tools="{")): "tools is not JSON",
    line(chat("x", rejected_response=[1])): "rejected_response is not text",
    line(chat("x", rejected_messages="?")): "rejected_messages is neither JSON nor a list",
    line(chat("x", margin=10**400)): "margin is too large",
    line(chat("x", images=["a.png"])): "images are not supported: only text is trained",
    # Conversations.
    line({"messages": [{"role": "user", "content": "x"}]}): "no assistant turn",
    line({"messages": chat("x")["messages"][::-1]}): "the last message is not the assistant's",
    line(call({"content": "f(x)"})): "tool_call is not JSON with name and arguments",
    line(call({"content": "", "tool_calls": 3})): "tool_calls is not a list of objects",
    line(chat("word " * 500)): LONG,
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The file, how often each reason occurs, and the number of the first damaged line."""
    chooser = random.Random(0)
    path = tmp_path_factory.mktemp("damage") / "rows.jsonl"
    rows = [line(chat(f"answer {index}")) for index in range(ROWS)]
    counts, damage = {}, list(DAMAGE.items())
    small = [item for item in damage if len(item[0]) < 1_000_000]
    places = sorted(chooser.sample(range(10, ROWS), 2000))
    for number, place in enumerate(places):
        bad, reason = damage[number] if number < len(damage) else chooser.choice(small)
        rows[place] = bad
        counts[reason] = counts.get(reason, 0) + 1
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path, counts, places[0] + 1


def reported(text):
    """The counts per reason that the log states."""
    return {
        reason: int(count)
        for count, reason in re.findall(r"(?:dropped: |; )(\d+) x (.*?) \(first: ", text)
    }


@pytest.mark.parametrize("num_proc", [1, 2])
def test_counts_per_reason_are_exact(damaged, make_tokenizer, templates, caplog, num_proc):
    caplog.set_level(logging.INFO)
    path, counts, _ = damaged
    template = Template(make_tokenizer(templates.chatml), max_length=400)
    rows, _ = load_rows([str(path)], dataset_num_proc=num_proc)
    encoded = encode_rows(rows, template, num_proc=num_proc)
    assert len(encoded) == ROWS - 2000
    found = {}
    for record in caplog.records:
        for reason, count in reported(record.getMessage()).items():
            found[reason] = found.get(reason, 0) + count
    assert found == counts
    assert sum(counts.values()) == 2000


def test_strict_stops_at_the_first(damaged):
    path, _, first = damaged
    with pytest.raises(UserError, match=rf"^--strict true: {path}:{first}: not UTF-8"):
        load_rows([str(path)], strict=True, dataset_num_proc=2)


@pytest.mark.parametrize("bad", DAMAGE, ids=lambda bad: f"{bad[:60]!r}")
def test_strict_names_every_damage(tmp_path, make_tokenizer, templates, bad):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line(chat("a")), line(chat("b")), bad, line(chat("c"))]))
    reason = DAMAGE[bad]
    template = Template(make_tokenizer(templates.chatml), max_length=400)
    if reason == LONG:  # not a bad row
        rows, _ = load_rows([str(path)], strict=True)
        assert len(encode_rows(rows, template, strict=True)) == 3
        return
    with pytest.raises(UserError, match=f"^--strict true: {path}:3: {re.escape(reason)}"):
        load_rows([str(path)], strict=True)


def random_value(chooser, depth=0):
    kinds = ["text", "number", "null", "bool"] + ["list", "object"] * (depth < 5)
    kind = chooser.choice(kinds)
    if kind == "list":
        return [random_value(chooser, depth + 1) for _ in range(chooser.randrange(4))]
    if kind == "object":
        return {
            chooser.choice(KEYS): random_value(chooser, depth + 1)
            for _ in range(chooser.randrange(5))
        }
    return chooser.choice({"text": TEXTS, "number": [0, -1, 1.5, 10**30, float("nan")],
                           "null": [None], "bool": [True, False]}[kind])  # fmt: skip


KEYS = [
    *("messages", "conversations", "role", "from", "content", "value", "query", "response"),
    *("instruction", "input", "history", "system", "tools", "tool_calls", "function", "name"),
    *("arguments", "rejected_response", "rejected_messages", "label", "channel", "margin", "human"),
    *("assistant", "text", "type", "tag", "images", "x"),
]
TEXTS = [
    *("", "user", "assistant", "system", "tool_call", "tool", "[]", "{}", "[[1, 2]]", "null", "zh"),
    *("</think>", "<think>", "<|im_end|>", "\ue0f1probe\ue0f2", "{% raw %}", "{{NAME", "\x00", " "),
    *('[{"role": "user", "content": "x"}]', '{"name": "f"}', "\udc80"),
]


def test_nothing_in_a_row_ends_the_run(tmp_path, make_tokenizer, templates):
    """Rows of random structure, half of them shaped like conversations."""
    chooser = random.Random(1)
    rows = [chat("a")]
    for _ in range(4000):
        row = {chooser.choice(KEYS): random_value(chooser) for _ in range(4)}
        if chooser.random() < 0.5:
            row["messages"] = [
                {"role": chooser.choice(TEXTS[1:6]), "content": random_value(chooser, 4)}
                for _ in range(chooser.randrange(1, 5))
            ]
            if chooser.random() < 0.8:
                for message in row["messages"]:
                    message["content"] = chooser.choice(TEXTS)
        rows.append(row)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(map(line, rows)))
    loaded, _ = load_rows([str(path)], model_name=["N"], model_author=["A"])
    for name in ("chatml", "thinking", "thinking_opened", "instruct", "no_end"):
        template = Template(make_tokenizer(getattr(templates, name)))
        assert len(encode_rows(loaded, template)) > 50
