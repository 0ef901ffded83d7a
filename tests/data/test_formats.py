"""Each row format in standard form, and what makes a row bad."""

import random
from functools import partial

import pytest

from swiftmeg.data.sources.formats import Identity, rename_columns, standard_row
from swiftmeg.data.standard_row import RowError
from swiftmeg.errors import UserError

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}


def standard(row):
    return standard_row(row, partial(random.Random, 0))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER, ASSISTANT], "id": 7},
        {"system": "S", "messages": [USER, ASSISTANT]},
        {"conversation": [{"from": "system", "value": "S"}, USER, ASSISTANT]},
        {
            "conversations": [
                {"role": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
            ]
        },
        {"system": "S", "conversation": [{"human": "Q", "assistant": "A"}]},
        {"system_prompt": "S", "conversation": [{"user": "Q", "bot": "A"}]},
        {"messages": '[{"role":"system","content":"S"},{"role":"user","content":"Q"},'
                     '{"role":"assistant","content":"A"}]'},
        {"messages": "[{'role':'system','content':'S'},{'role':'user','content':'Q'},"
                     "{'role':'assistant','content':'A'}]"},
        {"messages": [SYSTEM, {**USER, "content": [{"type": "text", "text": "Q"}]}, ASSISTANT]},
        {"system": "S", "query": "Q", "response": "A"},
        {"system": "S", "prompt": "Q", "completion": "A", "tools": None, "history": None},
        {"system": "S", "question": "Q", "answer": "A", "images": []},
        {"system": "S", "instruction": "Q", "output": "A"},
        {"system": "S", "instruction": "Q", "input": "", "output": "A"},
        {"system": "S", "instruction": "", "input": "Q", "output": "A", "text": "Q A"},
        {"system": "S", "instruction": "Q", "input": None, "output": "A"},
        {"system": "S", "problem": "Q", "response": None, "solution": "A"},
    ],
)  # fmt: skip
def test_formats(row):
    assert standard(row) == {"messages": [SYSTEM, USER, ASSISTANT]}


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert standard(row)["messages"][0]["content"] == "Add.\n1 2"


@pytest.mark.parametrize("history", [[["q1", "a1"], ["q2", "a2"]], '[["q1", "a1"], ["q2", "a2"]]'])
def test_history(history):
    row = {"query": "Q", "response": "A", "history": history, "system": "S"}
    contents = [message["content"] for message in standard(row)["messages"]]
    assert contents == ["S", "q1", "a1", "q2", "a2", "Q", "A"]


@pytest.mark.parametrize("column", ["text", "content", "response"])
def test_text_without_a_query(column):
    assert standard({column: "A", "url": "x"}) == {"messages": [ASSISTANT]}


def test_one_of_several_responses():
    row = {"query": "Q", "response": ["A", "B", "C"]}
    chosen = {
        standard_row(row, partial(random.Random, seed))["messages"][1]["content"]
        for seed in range(50)
    }
    assert chosen == {"A", "B", "C"}


@pytest.mark.parametrize(
    ("response", "text"), [(42, "42"), (-1.5, "-1.5"), (0, "0"), ([7], "7"), (1e300, "1e+300")]
)
def test_a_number_is_an_answer(response, text):
    row = {"question": "Q", "answer": response, "history": [["q", 3]]}
    contents = [message["content"] for message in standard(row)["messages"]]
    assert contents == ["q", "3", "Q", text]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER, ASSISTANT]),
        ({"prompt": "Q", "completion": [ASSISTANT]}, [USER, ASSISTANT]),
        ({"prompt": [USER], "completion": "A"}, [USER, ASSISTANT]),
        ({"prompt": [USER], "answer": 4}, [USER, {**ASSISTANT, "content": "4"}]),
        (
            {"prompt": [SYSTEM, USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            [SYSTEM, USER, {**ASSISTANT, "loss": False}, USER, ASSISTANT],
        ),
        (
            {"prompt": [USER, {**ASSISTANT, "loss": True}, USER], "completion": [ASSISTANT]},
            [USER, {**ASSISTANT, "loss": True}, USER, ASSISTANT],
        ),
        (
            {"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT], "system": "S"},
            [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
        ),
    ],
)
def test_prompt_and_completion_of_messages(row, expected):
    assert standard_row(row, partial(random.Random, 0), for_training=True)["messages"] == expected


def test_a_prompt_of_messages_alone_is_a_question():
    assert standard({"prompt": [USER]})["messages"] == [USER]
    with pytest.raises(RowError, match="the response is empty"):
        standard_row({"prompt": [USER]}, partial(random.Random, 0), for_training=True)


def test_tool_calls_become_messages_of_their_own():
    call = {"name": "look", "arguments": {"at": "sky"}}
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
            {"role": "observation", "content": "blue"},
            {"role": "function_call", "content": "{}"},
            {"role": "tool", "content": "sky"},
            ASSISTANT,
        ],
        "tools": [{"name": "look"}],
    }
    result = standard(row)
    assert [message["role"] for message in result["messages"]] == [
        *("user", "tool_call", "tool_response", "tool_call", "tool", "assistant"),
    ]
    assert result["messages"][1]["content"] == '{"name": "look", "arguments": {"at": "sky"}}'
    assert result["tools"] == '[{"name": "look"}]'


def test_kept_columns():
    row = {
        "messages": [USER, ASSISTANT],
        "rejected_response": "no",
        "rejected_messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "no"}],
        "label": True,
        "channel": "web",
        "margin": 1,
        "score": 3,
    }
    assert standard(row) == {
        "messages": [USER, ASSISTANT],
        "rejected_response": "no",
        "rejected_messages": [USER, {"role": "assistant", "content": "no"}],
        "label": True,
        "channel": "web",
        "margin": 1.0,
    }
    assert "label" not in standard({"messages": [USER, ASSISTANT], "label": 3})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, r"messages is neither JSON nor a list \(hello\)"),
        ({"messages": {"role": "user"}}, "messages is not a list of objects"),
        ({"messages": [{"role": "judge", "content": "x"}]}, r"unknown role \(judge; accepted:"),
        ({"messages": [{"role": "user", "content": None}]}, "a message has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, r"content is not text \(int\)"),
        ({"messages": [{"human": "x"}]}, "neither role and content nor human and assistant"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}]}, r"other kinds .*\(image"),
        ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "images are not supported"),
        ({"query": "Q", "response": None}, "the response is empty"),
        ({"query": "Q", "response": []}, "the response is empty"),
        ({"query": None, "response": "A"}, "the query is empty"),
        ({"query": "Q", "response": True}, r"response is not text \(bool\)"),
        ({"query": "Q", "response": float("nan")}, "response is not a finite number"),
        ({"query": "Q", "response": "A", "history": [["x"]]}, "history is not a list of pairs"),
        ({"query": "Q", "response": "\ud83d"}, "half of a surrogate pair"),
        ({"url": "x", "id": 3}, r"no known column \(the columns are url, id\)"),
    ],
)  # fmt: skip
def test_bad_rows(row, message):
    with pytest.raises(RowError, match=message):
        standard_row(row, partial(random.Random, 0), for_training=True)


def test_renaming():
    row = {"text1": "Q", "query": "old", "text2": "A"}
    renamed = rename_columns(row, {"text1": "query", "text2": "response", "absent": "x"})
    assert renamed == {"query": "Q", "response": "A"}


# Self-cognition.

PLACEHOLDERS = {"query": "{{NAME}}?", "response": "{{NAME}} by {{AUTHOR}}, {{NAME}}"}


@pytest.mark.parametrize(
    ("names", "tag", "response"),
    [
        (("Z", "E"), "zh", "Z by ZA, Z"),
        (("Z", "E"), "en", "E by EA, E"),
        (("O",), "zh", "O by OA, O"),
        (("O",), "en", "O by OA, O"),
    ],
)
def test_names_by_language(names, tag, response):
    identity = Identity(names, tuple(name + "A" for name in names))
    filled = identity.fill({**PLACEHOLDERS, "tag": tag})
    assert filled["response"] == response
    assert filled["query"] == response.split()[0] + "?"


def test_rows_without_a_tag_keep_their_braces():
    assert Identity(("a",), ("b",)).fill(PLACEHOLDERS) == PLACEHOLDERS


def test_a_placeholder_without_a_value():
    with pytest.raises(UserError, match=r"{{AUTHOR}}: give --model_author .*--model_name"):
        Identity(("a",), None).fill({**PLACEHOLDERS, "tag": "en"})
    with pytest.raises(UserError, match=r"{{NAME}}: give --model_name "):
        Identity(None, ("a",)).fill({**PLACEHOLDERS, "tag": "en"})


def test_too_many_names():
    with pytest.raises(UserError, match="--model_name a b c: 3 values; accepted: one, or"):
        Identity(("a", "b", "c"), ("x",))
