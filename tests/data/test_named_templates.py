"""Every template of the registry against Jinja text written for this test, on prefixes."""

# ruff: noqa: RUF001 - DeepSeek writes its tokens with full-width bars.

import dataclasses
import itertools
import json

import pytest

from swiftmeg.data.standard_row import RowError
from swiftmeg.data.template.chat_templates import CHAT_TEMPLATES
from swiftmeg.data.template.template import Template
from swiftmeg.errors import UserError

CONTENTS = ["Who are you?", "", "你好,我是助手 🙂", "two  spaces\n\nand a line", "été naïve: one"]


def im_markup(default):
    """The markup of ChatML, with a system turn of its own where none is given."""
    opening = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
        + default
        + "<|im_end|>\n{% endif %}"
    )
    return (
        "{% for m in messages %}{% if loop.first %}" + (opening if default else "") + "{% endif %}"
        "<|im_start|>{{ m['role'] }}{{ '\n' }}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    )


REFERENCES = {
    "chatml": im_markup(""),
    "qwen": im_markup("You are a helpful assistant."),
    "qwen2_5": im_markup("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "llama3": (
        "{% for m in messages %}"
        "{% set turn = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set prefix = (messages[0]['content'] | trim) + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}<start_of_turn>"
        "{{ ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ (prefix if loop.first else '') + (m['content'] | trim) }}<end_of_turn>{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"
    ),
    "deepseek_r1": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
        "{% endif %}{% for m in messages if m['role'] != 'system' %}"
        "{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
        "{% else %}<｜Assistant｜>{{ m['content'] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    ),
}


@pytest.fixture(params=CHAT_TEMPLATES)
def name(request):
    return request.param


@pytest.fixture
def make(make_tokenizer, name):
    """make(jinja) -> a tokenizer with the template's tokens."""

    def made(jinja):
        tokenizer = make_tokenizer(jinja)
        tokenizer.add_tokens(list(CHAT_TEMPLATES[name].tokens), special_tokens=True)
        return tokenizer

    return made


def conversation(turns, system):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for role, content in zip(["user", "assistant"] * turns, itertools.cycle(CONTENTS)):
        messages.append({"role": role, "content": content})
    return messages


def expected(tokenizer, messages):
    """Ids and labels: what each turn adds to the ids of the messages before it and a prompt."""

    def ids(messages, prompt=False):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]

    whole = ids(messages)
    labels = [-100] * len(whole)
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            start, so_far = len(ids(messages[:k], True)), ids(messages[: k + 1])
            assert whole[: len(so_far)] == so_far
            line_break = not tokenizer.decode(so_far[-1:]).strip()
            labels[start : len(so_far) - line_break] = whole[start : len(so_far) - line_break]
    return {"input_ids": whole, "labels": labels}


@pytest.mark.parametrize("system", [None, "", "Be brief. 请简短"])
@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5])
def test_ids_and_labels_are_those_of_the_reference(make, name, turns, system):
    messages = conversation(turns, system)
    encoded = Template(make(None), name=name).encode({"messages": messages})
    assert encoded == expected(make(REFERENCES[name]), messages)


def test_a_mutated_template_is_caught(make, name, monkeypatch):
    known = CHAT_TEMPLATES[name]
    messages = conversation(2, "Be brief.")
    right = expected(make(REFERENCES[name]), messages)
    end = known.tokens[-1]
    mutations = [
        known.jinja.replace(end, ""),
        known.jinja.replace("message.content", "message.content[:3]"),
        known.jinja.replace("for message in messages", "for message in messages[1:]"),
        known.jinja.replace("message.content", "message.content + '.'"),
    ]
    for jinja in mutations:
        assert jinja != known.jinja
        monkeypatch.setitem(CHAT_TEMPLATES, name, dataclasses.replace(known, jinja=jinja))
        try:
            encoded = Template(make(None), name=name).encode({"messages": messages})
        except (RowError, UserError):
            continue
        assert encoded != right


TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"q": '查 "x"'}}},
    {"type": "function", "function": {"name": "add"}},
]
TOOLS_TEXT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "look", "parameters": {"q": "查 \\"x\\""}}}
{"type": "function", "function": {"name": "add"}}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
"""


def called(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize("agent_template", [None, "hermes"])
@pytest.mark.parametrize("with_tools", [True, False])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tools_are_written_as_qwen2_5_does(make, name, system, with_tools, agent_template):
    """Text in the form of Qwen2.5's own template, and all that the model has to write trained."""
    if "tools" not in CHAT_TEMPLATES[name].jinja:
        with pytest.raises(UserError, match="--agent_template hermes: the chat template writes no"):
            Template(make(None), name=name, agent_template="hermes")
        return
    call = {"role": "tool_call", "content": '{"name": "look", "arguments": {"q": "啊", "n": 1}}'}
    found = {"role": "tool_response", "content": "found\nit"}
    row = {
        "messages": [
            *([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": "who?"},
            *({"role": "assistant", "content": "wait"}, call, call, found, found),
            *(call, found, {"role": "assistant", "content": "me"}),
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": ""},
        ],
        "tools": json.dumps(TOOLS) if with_tools else None,
    }
    shown = system or CHAT_TEMPLATES[name].system
    opening = shown or ""
    if with_tools:
        opening += ("\n\n" if shown else "") + TOOLS_TEXT
    elif shown:
        opening += "<|im_end|>\n"
    look, answer = (
        called("look", '{"q": "啊", "n": 1}'),
        "<tool_response>\nfound\nit\n</tool_response>",
    )
    trained = [
        f"wait\n{look}\n{look}<|im_end|>",
        f"{look}<|im_end|>",
        "me<|im_end|>",
        "<|im_end|>",
    ]
    start = "<|im_start|>assistant\n"
    text = (
        (f"<|im_start|>system\n{opening}" if opening else "")
        + f"<|im_start|>user\nwho?<|im_end|>\n{start}{trained[0]}\n"
        + f"<|im_start|>user\n{answer}\n{answer}<|im_end|>\n{start}{trained[1]}\n"
        + f"<|im_start|>user\n{answer}<|im_end|>\n{start}{trained[2]}\n"
        + f"<|im_start|>user\nand?<|im_end|>\n{start}{trained[3]}\n"
    )
    tokenizer = make(None)
    encoded = Template(tokenizer, name=name, agent_template=agent_template).encode(row)
    assert encoded["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    runs = itertools.groupby(encoded["labels"], key=lambda label: label != -100)
    assert [tokenizer.decode(list(run)) for is_trained, run in runs if is_trained] == trained


def test_other_ways_to_write_tools_are_refused(make, name):
    with pytest.raises(UserError, match="--agent_template react_en: tools are written as the chat"):
        Template(make(None), name=name, agent_template="react_en")


@pytest.mark.parametrize("what", ["tool calls", "tools"])
def test_tools_that_a_template_cannot_show_are_not_dropped_in_silence(make, name, what):
    if "tools" in CHAT_TEMPLATES[name].jinja:
        return
    call = {"role": "tool_call", "content": '{"name": "look", "arguments": {}}'}
    messages = conversation(1, None)
    row = {"messages": messages, "tools": '[{"type": "function", "function": {"name": "look"}}]'}
    if what == "tool calls":
        row = {"messages": [messages[0], call, {"role": "tool", "content": "x"}, messages[1]]}
    with pytest.raises(RowError, match=f"the chat template does not show {what}"):
        Template(make(None), name=name).encode(row)
