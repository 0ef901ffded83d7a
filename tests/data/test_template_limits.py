"""Chat templates that do not end, cannot be compiled, or are one of several."""

import json
import time

import pytest

from swiftmeg.data.encoded.encode import encode_rows
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.template import template_limits
from swiftmeg.data.template.template import Template
from swiftmeg.errors import UserError
from tests.data.test_template import TOOLED, user_assistant

FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 1)
    monkeypatch.setattr(template_limits, "MOST_TEXT", 2**16)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (FOR_EVER, "takes more than 1 s"),
        ("{{ 'a' * 10**10 }}", "needs more than 1 GiB"),
        ("{% set n = messages | length %}{{ ('a' * n) * 10**10 }}", "needs more than 1 GiB"),
        ("{{ 10 ** (10 ** 10) }}", "more than 1 "),
        ("{{ '%2000000000s' % 'a' }}", "needs more than 1 GiB"),
        ("{{ 'a' * 70000 }}", "writes more than 65,536 characters"),
        ("{% for %}", "line 1: Expected"),
        ("{{ 'x' | no_such_filter }}", "line 1: No filter named 'no_such_filter'"),
    ],
)
@pytest.mark.parametrize("file", [False, True])
def test_a_template_that_cannot_work_is_named(
    tmp_path, make_tokenizer, templates, code, fault, file
):
    jinja = code + templates.chatml
    (tmp_path / "own.jinja").write_text(jinja)
    start = time.monotonic()
    name = str(tmp_path / "own.jinja") if file else None
    tokenizer = make_tokenizer(None if file else jinja)
    with pytest.raises(UserError) as caught:
        Template(tokenizer, name=name)
    assert time.monotonic() - start < 60
    line = str(caught.value)
    assert "\n" not in line
    named = f"--template {tmp_path}/own.jinja" if file else "the chat template of the model's"
    assert line.startswith(named)
    assert fault in line


def test_a_row_for_which_a_template_does_not_end(tmp_path, make_tokenizer, templates):
    jinja = "{% if messages[0].content == 'trap' %}" + FOR_EVER + "{% endif %}" + templates.chatml
    rows = [{"messages": user_assistant(text, "a")} for text in ("q", "trap", "q")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded, _ = load_rows([str(tmp_path / "rows.jsonl")], dataset_shuffle=False)
    for processes in (1, 2):
        with pytest.raises(UserError, match=r"rows\.jsonl:2: the chat template takes more than"):
            encode_rows(loaded, Template(make_tokenizer(jinja)), num_proc=processes)


def several(make_tokenizer, templates, **others):
    return make_tokenizer({"default": templates.chatml, "tool_use": TOOLED, **others})


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_one_of_several_is_chosen_as_transformers_does(make_tokenizer, templates, tools):
    tokenizer = several(make_tokenizer, templates)
    messages = user_assistant("q", "a")
    expected = tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    row = {"messages": messages, "tools": json.dumps(tools) if tools else None}
    template = Template(tokenizer)
    assert template.encode(row)["input_ids"] == expected
    assert (
        template.encode_prompt(messages[:1], row["tools"])
        == tokenizer.apply_chat_template(messages[:1], tools=tools, add_generation_prompt=True)[
            "input_ids"
        ]
    )


def test_one_of_several_by_name(make_tokenizer, templates):
    tokenizer = several(make_tokenizer, templates, rag=templates.headers)
    row = {"messages": user_assistant("q", "a")}
    expected = tokenizer.apply_chat_template(row["messages"], chat_template="rag")["input_ids"]
    assert Template(tokenizer, name="rag").encode(row)["input_ids"] == expected
    assert Template(tokenizer).identity() != Template(tokenizer, name="rag").identity()
    without = make_tokenizer({"rag": templates.headers, "tool_use": TOOLED})
    with pytest.raises(
        UserError, match=r"tokenizer has only rag, tool_use: choose one with --temp"
    ):
        Template(without)


@pytest.mark.parametrize(
    ("name", "jinja"),
    [
        ("default", "chatml"),
        ("qwen3", "thinking"),
        ("qwen3_nothinking", "chatml"),
        ("llama3_2", "headers"),
        ("mistral_nemo", "instruct"),
    ],
)
def test_upstream_names_of_the_tokenizers_own(make_tokenizer, templates, caplog, name, jinja):
    tokenizer = make_tokenizer(getattr(templates, jinja))
    row = {"messages": user_assistant("q", "a")}
    with caplog.at_level("INFO"):
        encoded = Template(tokenizer, name=name).encode(row)
    assert encoded == Template(tokenizer).encode(row)
    assert f"--template {name}: taken as the tokenizer's own chat template" in caplog.text


def test_an_upstream_name_of_another_template(make_tokenizer, templates):
    with pytest.raises(UserError, match=r"--template qwen3: .* own chat template is another: .*"):
        Template(make_tokenizer(templates.headers), name="qwen3")
    with pytest.raises(UserError, match=r"tokenizer has no chat template"):
        Template(make_tokenizer(None), name="qwen3")
