"""Thinking beside the content: shown and trained where the template shows it, else said."""

import itertools
import json
import logging

import pytest

from swiftmeg.data.encoded.encode import encode_rows
from swiftmeg.data.encoded.lazy import LazyDataset
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.template.template import Template


def qwen3(key):
    """As Qwen3's: `key` beside the content, shown in turns behind the last question."""
    return (
        "{% set ns = namespace(query=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}"
        "{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.index0 > ns.query %}"
        "{{ '<think>\n' + (m.KEY if m.KEY is string else '') + '\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ).replace("KEY", key)


def everywhere(opened):
    """Shows the thinking of every turn; the generation prompt may open it."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
        "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nOPEN' }}{% endif %}"
    ).replace("OPEN", "<think>\n" if opened else "")


def row(*, key="reasoning_content", turns=2):
    messages = []
    for number in range(1, turns + 1):
        messages.append({"role": "user", "content": f"q{number}"})
        messages.append({"role": "assistant", "content": f"a{number}", key: f"thought {number}"})
    return {"messages": messages}


def load(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return load_rows([str(path)], dataset_shuffle=False)[0]


def texts(tokenizer, encoded):
    groups = itertools.groupby(
        zip(encoded["labels"], encoded["input_ids"], strict=True), lambda pair: pair[0] != -100
    )
    return [tokenizer.decode([i for _, i in group]) for kept, group in groups if kept]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("shown_as", ["reasoning_content", "thinking", "reasoning"])
def test_the_text_is_that_of_apply_chat_template(tmp_path, make_tokenizer, key, shown_as):
    tokenizer = make_tokenizer(qwen3(shown_as))
    rows = load(tmp_path, row(key=key))
    encoded = encode_rows(rows, Template(tokenizer))
    expected = tokenizer.apply_chat_template(row(key=shown_as)["messages"])["input_ids"]
    assert encoded[0]["input_ids"].tolist() == expected
    # The first turn's thinking is stripped: what is left is not what the model should produce.
    assert texts(tokenizer, encoded[0]) == ["<think>\nthought 2\n</think>\n\na2<|im_end|>"]


@pytest.mark.parametrize("opened", [False, True])
def test_thinking_that_is_shown_is_trained_in_every_turn(tmp_path, make_tokenizer, opened):
    tokenizer = make_tokenizer(everywhere(opened))
    (encoded,) = encode_rows(load(tmp_path, row()), Template(tokenizer))
    begin = "" if opened else "<think>\n"
    assert texts(tokenizer, encoded) == [
        f"{begin}thought {n}\n</think>\n\na{n}<|im_end|>" for n in (1, 2)
    ]


def test_thinking_before_a_tool_call_without_text(tmp_path, make_tokenizer):
    jinja = qwen3("reasoning_content").replace(
        "{{ m.content +", "{{ m.tool_calls[0].function.name if m.tool_calls }}{{ m.content +"
    )
    tokenizer = make_tokenizer(jinja)
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"}
    (encoded,) = encode_rows(
        load(tmp_path, {"messages": [{"role": "user", "content": "q"}, said]}), Template(tokenizer)
    )
    assert texts(tokenizer, encoded) == ["<think>\nhm\n</think>\n\nlook<|im_end|>"]


def test_names_and_ids_reach_a_template_that_shows_them(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + (m.name or '') + '\n' + m.content }}"
        "{{ m.tool_call_id or '' }}{% for c in m.tool_calls or [] %}{{ c.id }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"id": "abc", "type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "q", "name": "Eve"},
        {"role": "assistant", "content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "blue", "tool_call_id": "abc", "name": "look"},
        {"role": "assistant", "content": "end"},
    ]
    (encoded,) = encode_rows(load(tmp_path, {"messages": messages}), Template(tokenizer))
    expected = tokenizer.apply_chat_template(messages)["input_ids"]
    assert encoded["input_ids"].tolist() == expected


def test_a_template_that_does_not_show_it(tmp_path, make_tokenizer, templates, caplog):
    template = Template(make_tokenizer(templates.chatml))
    plain = {"messages": [{k: m[k] for k in ("role", "content")} for m in row()["messages"]]}
    rows = load(tmp_path, row(), plain, row(turns=1))
    with caplog.at_level(logging.INFO):
        encoded = encode_rows(rows, template)
    assert encoded[0]["input_ids"].tolist() == encoded[1]["input_ids"].tolist()
    assert "3 messages have reasoning_content that the chat template does not show" in caplog.text
    caplog.clear()
    lazy = LazyDataset(rows, Template(template.tokenizer))
    for index in (0, 2, 0):
        assert lazy[index]["length"]
    assert caplog.text.count("that the chat template does not show") == 1


@pytest.mark.parametrize("text", ["", "one"])
def test_no_thinking_where_the_prompt_opens_it(make_tokenizer, templates, text):
    tokenizer = make_tokenizer(templates.thinking_opened)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    encoded = Template(tokenizer, loss_scale="ignore_empty_think").encode({"messages": messages})
    assert texts(tokenizer, encoded) == [text + "<|im_end|>"]
    messages[1]["content"] = "<think>\nhm\n</think>\n\n" + text
    encoded = Template(tokenizer, loss_scale="ignore_empty_think").encode({"messages": messages})
    assert texts(tokenizer, encoded) == ["hm\n</think>\n\n" + text + "<|im_end|>"]
