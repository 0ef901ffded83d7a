"""Ids and masks against the tokenizer's own rendering of the conversation's prefixes."""

import itertools
import json
import random

import pytest

from swiftmeg.data.standard_row import RowError, RowTooLong
from swiftmeg.data.template.span_tokenizer import SpanTokenizer, _by_bytes
from swiftmeg.data.template.template import Template
from swiftmeg.data.tools import to_chat
from swiftmeg.errors import UserError

CONTENTS = [
    "Who are you?",
    "",
    "你好,我是助手 🙂",
    "  two  spaces\nand a line\n\nand more ",
    "été naïve: one two",
]


def conversation(turns, system=None, contents=CONTENTS):
    texts = itertools.cycle(contents)
    messages = [{"role": "system", "content": system}] if system is not None else []
    for _ in range(turns):
        messages.append({"role": "user", "content": next(texts)})
        messages.append({"role": "assistant", "content": next(texts)})
    return messages


def user_assistant(*contents):
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def ids_of(tokenizer, messages, prompt=False):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]


def expected(tokenizer, messages):
    """Ids and mask from the ids of prefixes: all that a turn adds, but for a last line break."""
    ids = ids_of(tokenizer, messages)
    mask = [False] * len(ids)
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = ids_of(tokenizer, messages[:k], True)
            so_far = ids_of(tokenizer, messages[: k + 1])
            assert ids[: len(prompt)] == prompt
            assert ids[: len(so_far)] == so_far
            end = len(so_far)
            while not tokenizer.decode(so_far[end - 1 : end]).strip():
                end -= 1
            for index in range(len(prompt), end):
                mask[index] = True
    mask[0] = False
    return ids, mask


def check(tokenizer, messages, **options):
    encoded = Template(tokenizer, **options).encode({"messages": messages})
    ids, mask = expected(tokenizer, messages)
    assert encoded["input_ids"] == ids
    assert encoded["labels"] == [
        token if trained else -100 for token, trained in zip(ids, mask, strict=True)
    ]


def trained_text(tokenizer, row, **options):
    labels = Template(tokenizer, **options).encode(row)["labels"]
    groups = itertools.groupby(labels, key=lambda label: label != -100)
    return [tokenizer.decode(list(group)) for trained, group in groups if trained]


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("name", "system"),
    [
        *itertools.product(["chatml", "headers"], [None, "Be brief.", ""]),
        ("instruct", None),  # knows no system role
    ],
)
def test_ids_and_mask_equal_those_of_prefixes(make_tokenizer, templates, turns, system, name):
    tokenizer = make_tokenizer(getattr(templates, name))
    check(tokenizer, conversation(turns, system))


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", ["chatml", "headers"])
def test_a_tokenizer_with_word_boundary_marks(make_tokenizer, templates, turns, name):
    tokenizer = make_tokenizer(getattr(templates, name), kind="metaspace")
    check(tokenizer, conversation(turns, "Be brief."))


@pytest.mark.parametrize("turns", [1, 3])
def test_a_slow_tokenizer_is_fed_by_pieces(make_tokenizer, templates, turns):
    tokenizer = make_tokenizer(templates.chatml, kind="slow")
    assert not tokenizer.is_fast
    check(tokenizer, conversation(turns, "Be brief."))


def with_header_end(chatml, end):
    return chatml.replace("assistant\n'", f"assistant{end}'").replace(
        "m.role + '\n'", f"m.role + '{end}'"
    )


def test_the_header_is_not_trained_although_its_place_is_trimmed(make_tokenizer, templates):
    # With trimmed places, the token of the blank would seem to begin behind it.
    tokenizer = make_tokenizer(with_header_end(templates.chatml, ": "))
    row = {"messages": user_assistant("hi", "\nfox")}
    assert tokenizer("a: \nfox", return_offsets_mapping=True)["offset_mapping"][2] == (3, 3)
    assert trained_text(tokenizer, row) == ["\nfox<|im_end|>"]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_no_token_joins_the_prompt_and_the_answer(make_tokenizer, templates, kind):
    tokenizer = make_tokenizer(with_header_end(templates.chatml, ": "), kind)
    row = {"messages": user_assistant("hi", "fox")}
    encoded = Template(tokenizer).encode(row)
    prompt = Template(tokenizer).encode_prompt(row["messages"][:1])
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert trained_text(tokenizer, row) == ["fox<|im_end|>"]


def test_a_turn_is_trained_to_its_end_token(make_tokenizer, templates):
    row = {"messages": user_assistant("a", "one", "b", "two")}
    tokenizer = make_tokenizer(templates.chatml)
    assert trained_text(tokenizer, row) == ["one<|im_end|>", "two<|im_end|>"]
    assert trained_text(tokenizer, row, loss_scale="last_round") == ["two<|im_end|>"]


def test_all_trains_everything_but_the_first_token(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    encoded = Template(tokenizer, loss_scale="all").encode({"messages": conversation(2)})
    assert encoded["labels"] == [-100, *encoded["input_ids"][1:]]


def test_a_turn_closed_by_another_token_than_the_last(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.returns)
    row = {"messages": user_assistant("a", "one", "b", "two")}
    assert trained_text(tokenizer, row) == ["one<|im_end|>", "two<|return|>"]


def test_eos_is_added_where_nothing_closes_the_last_turn(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.no_end)
    row = {"messages": user_assistant("a", "one", "b", "two")}
    # What opens the user's turn is how such a model stops.
    assert trained_text(tokenizer, row) == ["one<|user|>", "two</s>"]
    ids = Template(tokenizer).encode(row)["input_ids"]
    assert ids == [*ids_of(tokenizer, row["messages"]), tokenizer.eos_token_id]


def test_the_end_of_a_part_does_not_close_a_turn(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.no_end)
    tokenizer.add_tokens(["</tool_call>"], special_tokens=False)
    row = {"messages": user_assistant("a", "x</tool_call>", "b", "y</tool_call>")}
    assert trained_text(tokenizer, row) == ["x</tool_call><|user|>", "y</tool_call></s>"]


def test_a_conversation_may_begin_with_the_assistant(make_tokenizer, templates):
    row = {"messages": [{"role": "assistant", "content": "Hi."}, *user_assistant("a", "one")]}
    tokenizer = make_tokenizer(templates.headers)
    assert trained_text(tokenizer, row) == ["Hi.<|eot_id|>", "one<|eot_id|>"]


# Thinking templates.


def test_plain_history_of_a_thinking_template_is_trained(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.thinking)
    row = {"messages": user_assistant("a", "one", "b", "two", "c", "three")}
    empty = "<think>\n\n</think>\n\n"
    assert trained_text(tokenizer, row) == [
        "one<|im_end|>",
        "two<|im_end|>",
        empty + "three<|im_end|>",
    ]
    skipped = trained_text(tokenizer, row, loss_scale="ignore_empty_think")
    assert skipped == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
    last = trained_text(tokenizer, row, loss_scale="last_round_with_ignore_empty_think")
    assert last == ["three<|im_end|>"]


def test_a_turn_whose_thinking_is_stripped_is_context_only(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.thinking)
    thought = "<think>\nhm\n</think>\n\n"
    template = Template(tokenizer)
    row = {"messages": user_assistant("a", thought + "one", "b", thought + "two")}
    assert trained_text(tokenizer, row) == [thought + "two<|im_end|>"]
    template.encode(row)
    assert template.counts["context_only_turns"] == 1


def test_history_without_the_thinking_that_the_prompt_opens_is_context_only(
    make_tokenizer, templates
):
    tokenizer = make_tokenizer(templates.thinking_opened)
    row = {"messages": user_assistant("a", "one", "b", "<think>\nhm\n</think>\n\ntwo")}
    assert trained_text(tokenizer, row) == ["hm\n</think>\n\ntwo<|im_end|>"]


# Ambiguous templates are refused, never trained on everything.


@pytest.mark.parametrize(
    ("name", "turns", "system"), [("system_last", 2, "Be brief."), ("reordered", 2, None)]
)
def test_a_template_that_rewrites_history_is_refused(
    make_tokenizer, templates, name, turns, system
):
    template = Template(make_tokenizer(getattr(templates, name)))
    contents = ["one", "two", "three", "four"]
    with pytest.raises(UserError, match=r"chat template: message \d \(assistant\) .*--template"):
        template.encode({"messages": conversation(turns, system, contents)})


def test_only_the_last_turn_is_needed_for_last_round(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.system_last)
    row = {"messages": conversation(2, "Be brief.", ["a", "one", "b", "two"])}
    assert trained_text(tokenizer, row, loss_scale="last_round") == ["two</s>"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # The last turn does not begin as the generation prompt does.
        ("'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>model\n' }}{% endif %}"),
        # Earlier turns are cut short.
        ("+ m.content +", "+ (m.content if loop.last else m.content[:2]) +"),
        # Earlier turns are shown twice.
        ("+ m.content +", "+ m.content + ('' if loop.last else m.content) +"),
        # The number of messages to come is told at the start.
        ("{% for m in messages %}", "{{ messages | length }}{% for m in messages %}"),
    ],
)
def test_a_mutated_template_is_refused(make_tokenizer, templates, old, new):
    assert old in templates.chatml
    template = Template(make_tokenizer(templates.chatml.replace(old, new, 1)))
    with pytest.raises(UserError, match="cannot be told apart"):
        template.encode({"messages": user_assistant("a", "first answer", "b", "second answer")})


# System prompts.


def test_row_before_argument_before_template(make_tokenizer, templates, tmp_path):
    tokenizer = make_tokenizer(templates.chatml)
    rows = {
        "row": [{"role": "system", "content": "ROW"}, *user_assistant("a", "b")],
        "none": user_assistant("a", "b"),
    }
    path = tmp_path / "system.txt"
    path.write_text("from\nfile\n")

    def text(row, **options):
        return tokenizer.decode(
            Template(tokenizer, **options).encode({"messages": row})["input_ids"]
        )

    assert "system\nROW<" in text(rows["row"], system="ARG")
    assert "system\nARG\nline<" in text(rows["none"], system="ARG\\nline")
    assert "system\nfrom\nfile<" in text(rows["none"], system=str(path))
    assert "system\nYou are a test.<" in text(rows["none"])
    assert "system\nYou are Qwen" in text(rows["none"], name="qwen2_5")
    with pytest.raises(UserError, match=r"--system .*missing.txt: cannot be read"):
        Template(tokenizer, system=str(tmp_path / "missing.txt"))


# Lengths.


def test_truncation(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    row = {"messages": user_assistant("who are you", "the quick brown fox")}
    whole = Template(tokenizer).encode(row)
    limit = len(whole["input_ids"]) - 3
    with pytest.raises(RowTooLong, match=rf"longer than --max_length {limit} \({limit + 3} tokens"):
        Template(tokenizer, max_length=limit).encode(row)
    left = Template(tokenizer, max_length=limit, truncation_strategy="left").encode(row)
    assert left["input_ids"] == whole["input_ids"][3:]
    assert left["labels"] == whole["labels"][3:]
    right = Template(tokenizer, max_length=limit, truncation_strategy="right").encode(row)
    assert right["input_ids"] == whole["input_ids"][:limit]
    assert right["labels"] == whole["labels"][:limit]
    fits = Template(tokenizer, max_length=limit + 3).encode(row)
    assert fits == whole


def test_the_first_token_is_untrained_after_cutting_on_the_left(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    row = {"messages": user_assistant("a", "the quick brown fox jumps over")}
    cut = Template(tokenizer, max_length=4, truncation_strategy="left").encode(row)
    assert cut["labels"][0] == -100
    assert cut["labels"][1] == cut["input_ids"][1]


def test_nothing_left_to_train_is_a_bad_row(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    template = Template(tokenizer, max_length=4, truncation_strategy="right")
    with pytest.raises(RowError, match="no token to train"):
        template.encode({"messages": user_assistant("a", "b")})


# Plain text.


@pytest.mark.parametrize("options", [{"use_chat_template": False}, {"name": "generation"}])
def test_plain_text_lies_between_bos_and_eos(make_tokenizer, options):
    tokenizer = make_tokenizer(None)
    row = {"messages": [{"role": "assistant", "content": "the fox"}]}
    encoded = Template(tokenizer, **options).encode(row)
    text = tokenizer("the fox")["input_ids"]
    assert encoded["input_ids"] == [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
    assert encoded["labels"] == [-100, *encoded["input_ids"][1:]]


def test_plain_text_without_bos(make_tokenizer):
    tokenizer = make_tokenizer(None, bos_token=None)
    row = {"messages": [{"role": "assistant", "content": "the fox"}]}
    encoded = Template(tokenizer, use_chat_template=False).encode(row)
    text = tokenizer("the fox")["input_ids"]
    assert encoded["input_ids"] == [*text, tokenizer.eos_token_id]
    assert encoded["labels"] == [-100, *encoded["input_ids"][1:]]


def test_a_query_in_plain_text_is_trained_only_by_all(make_tokenizer):
    tokenizer = make_tokenizer(None)
    row = {"messages": user_assistant("who?", "fox")}
    options = {"use_chat_template": False}
    assert trained_text(tokenizer, row, **options) == ["fox</s>"]
    assert trained_text(tokenizer, row, loss_scale="all", **options) == ["who?fox</s>"]


# Prompts.


def test_prompt_is_what_the_trained_turn_follows(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    messages = conversation(3)
    template = Template(tokenizer)
    assert template.encode_prompt(messages[:-1]) == ids_of(tokenizer, messages[:-1], True)
    prompt = template.encode_prompt(messages[:-1])
    assert template.encode({"messages": messages})["input_ids"][: len(prompt)] == prompt
    prefixed = Template(tokenizer, response_prefix="<think>\n").encode_prompt(messages[:-1])
    assert prefixed == prompt + tokenizer.encode("<think>\n")
    plain = Template(tokenizer, use_chat_template=False).encode_prompt(messages[:1])
    assert plain == [tokenizer.bos_token_id, *tokenizer.encode(messages[0]["content"])]


def test_tools_reach_the_template(make_tokenizer, templates):
    tooled = "{% if tools %}{{ tools | tojson }}{% endif %}" + templates.chatml.replace(
        "+ m.content +",
        "+ m.content + (m.tool_calls | map(attribute='function') | list | tojson "
        "if m.tool_calls else '') +",
    )
    tokenizer = make_tokenizer(tooled)
    row = {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "tool_call", "content": '{"name": "look", "arguments": {"at": "sky"}}'},
            {"role": "tool_response", "content": "blue"},
            {"role": "assistant", "content": "It is blue."},
        ],
        "tools": '[{"type": "function", "function": {"name": "look"}}]',
    }
    assert trained_text(tokenizer, row) == [
        '[{"name": "look", "arguments": {"at": "sky"}}]<|im_end|>',
        "It is blue.<|im_end|>",
    ]
    text = tokenizer.decode(Template(tokenizer).encode(row)["input_ids"])
    assert text.startswith('[{"type": "function"')
    assert "<|im_start|>tool\nblue<|im_end|>" in text
    bad = {"messages": [*row["messages"][:1], {"role": "tool_call", "content": "look()"}]}
    with pytest.raises(RowError, match="tool_call is not JSON with name and arguments"):
        Template(tokenizer).encode(bad)
    with pytest.raises(RowError, match="tools is not JSON"):
        Template(tokenizer).encode({**row, "tools": "look"})


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "look", "parameters": {"x": None}},
        {"function": {"name": "look", "parameters": {"x": None}}},
        {"type": "function", "name": "look", "parameters": {"x": None}},
    ],
)
def test_a_tool_without_a_type_is_a_function(make_tokenizer, tool):
    tokenizer = make_tokenizer(TOOLED)
    messages = user_assistant("q", "a")
    full = {"type": "function", "function": {"name": "look", "parameters": {"x": None}}}
    expected = tokenizer.apply_chat_template(messages, tools=[full])["input_ids"]
    row = {"messages": messages, "tools": json.dumps([tool])}
    assert Template(tokenizer).encode(row)["input_ids"] == expected


TOOLED = (  # as Qwen's: schemas in the system turn, calls and results in tags
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_and_mask_with_tool_calls_equal_those_of_prefixes(make_tokenizer, turns, system):
    """A turn may be text, one call, several, or text with a call; empty and of any script."""
    tokenizer = make_tokenizer(TOOLED)
    tools = [{"type": "function", "function": {"name": "look"}}]
    call = {"role": "tool_call", "content": '{"name": "look", "arguments": {"at": "天空 🙂"}}'}
    result = {"role": "tool_response", "content": "blau, été"}
    says = {"role": "assistant", "content": "Let me see."}
    kinds = [[call, result], [call, call, result, result], [says, call, result], []]
    messages = [{"role": "system", "content": system}] if system else []
    for number, content in zip(range(turns), itertools.cycle(CONTENTS)):
        messages.append({"role": "user", "content": content})
        messages += kinds[number % len(kinds)]
        messages.append({"role": "assistant", "content": content})
    encoded = Template(tokenizer).encode({"messages": messages, "tools": json.dumps(tools)})

    def ids(messages, prompt=False):
        return tokenizer.apply_chat_template(messages, tools, add_generation_prompt=prompt)[
            "input_ids"
        ]

    chat = to_chat(messages)
    whole, trained = ids(chat), set()
    for k, message in enumerate(chat):
        if message["role"] == "assistant":
            prompt, so_far = ids(chat[:k], True), ids(chat[: k + 1])
            assert whole[: len(so_far)] == so_far
            trained |= set(range(len(prompt), len(so_far) - 1))  # the line break is not
    assert encoded["input_ids"] == whole
    assert {place for place, label in enumerate(encoded["labels"]) if label != -100} == trained


# Named templates.


def test_gemma_puts_the_system_prompt_into_the_first_user_turn(make_tokenizer):
    tokenizer = make_tokenizer(None)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    template = Template(tokenizer, name="gemma")
    encoded = template.encode({"messages": conversation(2, "SYS", ["a", "one", "b", "two"])})
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<s><start_of_turn>user\nSYS\n\na<end_of_turn>\n<start_of_turn>model\none<end_of_turn>\n"
        "<start_of_turn>user\nb<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n"
    )


def test_deepseek_r1_keeps_the_thinking_of_every_turn(make_tokenizer):
    from swiftmeg.data.template.chat_templates import CHAT_TEMPLATES

    tokenizer = make_tokenizer(None)
    tokenizer.add_tokens(list(CHAT_TEMPLATES["deepseek_r1"].tokens), special_tokens=True)
    thought = "<think>\nhm\n</think>\n\n"
    messages = [{"role": "system", "content": "SYS"}]
    messages += user_assistant("a", thought + "one", "b", thought + "two")
    end = CHAT_TEMPLATES["deepseek_r1"].tokens[-1]
    assert trained_text(tokenizer, {"messages": messages}, name="deepseek_r1") == [
        thought + "one" + end,
        thought + "two" + end,
    ]


def test_a_template_file(make_tokenizer, templates, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(templates.chatml)
    row = {"messages": conversation(1)}
    own = Template(make_tokenizer(templates.chatml)).encode(row)
    assert Template(make_tokenizer(None), name=str(path)).encode(row) == own


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no chat template: choose one with --template .* --use_chat_template false"),
        ({"name": "chatmi"}, "--template chatmi: unknown; accepted: chatml, .*generation"),
        ({"name": "gemma"}, "--template gemma: .* no token <start_of_turn> <end_of_turn>: add"),
        ({"name": "no.jinja"}, "--template no.jinja: cannot be read"),
        ({"loss_scale": "al"}, "--loss_scale al: al: unknown; accepted: default, last_round, all"),
        ({"truncation_strategy": "split"}, "--truncation_strategy split: .*delete, left, right"),
        ({"max_length": 1}, "--max_length 1: must be at least 2"),
    ],
)
def test_bad_options(make_tokenizer, options, message):
    with pytest.raises(UserError, match=message) as raised:
        Template(make_tokenizer(None), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        (user_assistant("a", "b", "c"), r"the last message is not the assistant's \(user\)"),
    ],
)
def test_bad_rows(make_tokenizer, templates, messages, message):
    with pytest.raises(RowError, match=message):
        Template(make_tokenizer(templates.chatml)).encode({"messages": messages})


def test_what_the_template_refuses_is_a_bad_row(make_tokenizer, templates):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = Template(make_tokenizer(strict + templates.chatml))
    with pytest.raises(RowError, match=r"refuses the messages \(no system\)"):
        template.encode({"messages": conversation(1, "Be brief.")})
    template = Template(make_tokenizer(templates.chatml + "{{ 'a' + messages }}"))
    with pytest.raises(RowError, match=r"refuses the messages \(can only concatenate"):
        template.encode({"messages": conversation(1)})


# Shortcuts give what the general way gives.


@pytest.mark.parametrize("name", ["chatml", "headers", "instruct", "no_end", "returns", "thinking"])
def test_turns_of_known_shapes_are_where_a_search_finds_them(make_tokenizer, templates, name):
    tokenizer = make_tokenizer(getattr(templates, name))
    contents = ["one", " two ", "", "<b>x</b> [INST]", "</think>", "<|im_end|>", "été\n", "{{ x }}"]
    chooser = random.Random(0)
    used = 0
    for _ in range(200):
        messages = conversation(chooser.randrange(1, 4), None, chooser.choices(contents, k=8))
        quick, slow = Template(tokenizer), Template(tokenizer)
        quick.encode({"messages": conversation(len(messages) // 2, None, ["a", "b"])})
        slow._shapes.turns = lambda messages, text: None
        text = quick._renderer.text(messages, None, False)
        used += quick._shapes.turns(messages, text) is not None
        try:
            expected = slow.encode({"messages": messages})
        except RowError:
            continue
        assert quick.encode({"messages": messages}) == expected
    assert used > 20


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_places_told_from_lengths_are_those_that_are_reported(make_tokenizer, kind):
    tokenizer = make_tokenizer(None, kind=kind)
    quick, slow = SpanTokenizer(tokenizer), SpanTokenizer(tokenizer)
    slow._bytes = None
    chooser = random.Random(0)
    pieces = [
        "the quick",
        " brown",
        "fox\n",
        "🙂",
        "e\u0301",
        "é",
        "你好",
        "<|im_end|>",
        "  ",
        "</s>",
    ]
    used = 0
    for _ in range(1000):
        text = "".join(chooser.choices(pieces, k=6))
        start, end = sorted(chooser.sample(range(len(text) + 1), 2))
        ((ids, found),) = quick.ids_and_spans([text], [[(start, end)]])
        ((other_ids, other_found),) = slow.ids_and_spans([text], [[(start, end)]])
        assert (ids.tolist(), found) == (other_ids.tolist(), other_found)
        used += quick._bytes is not None and bool(
            _by_bytes(ids, text, [(start, end)], quick._bytes)
        )
    assert (used > 200) == (kind == "byte_level")


REACT = "Thought: why\nAction: look\nAction Input: {}\nObservation: found\nFinal Answer: yes"


@pytest.mark.parametrize("kind", ["byte_level", "slow"])
def test_weights_of_tokens(make_tokenizer, templates, kind):
    tokenizer = make_tokenizer(templates.chatml, kind)
    row = {"messages": user_assistant("Action: no", REACT, "b", "x Action: y")}
    found = Template(tokenizer, loss_scale="react").encode(row)
    plain = Template(tokenizer).encode(row)
    if kind == "byte_level":  # whose tokens do not cross the borders between the parts
        assert found["input_ids"] == plain["input_ids"]
    assert tokenizer.decode(found["input_ids"]) == tokenizer.decode(plain["input_ids"])
    parts = []
    tokens = zip(found["input_ids"], found["labels"], found["loss_scale"], strict=True)
    for (trained, weight), run in itertools.groupby(tokens, lambda t: (t[1] != -100, t[2])):
        assert trained == bool(weight)
        if trained:
            parts.append((weight, tokenizer.decode([token for token, *_ in run]).strip()))
    assert parts == [
        (1, "Thought: why"),
        (2, "Action: look\nAction Input: {}\nObservation:"),
        (1, "Final Answer: yes<|im_end|>"),
        (1, "x"),
        (2, "Action: y"),
        (1, "<|im_end|>"),
    ]
    last = Template(tokenizer, loss_scale="last_round+react").encode(row)
    count = sum(map(bool, last["loss_scale"]))
    assert tokenizer.decode(last["input_ids"][-count - 1 :]) == "x Action: y<|im_end|>\n"
    assert last["loss_scale"][-count - 1 :] == found["loss_scale"][-count - 1 :]


def test_weights_are_cut_with_the_row(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    row = {"messages": user_assistant("a", REACT)}
    whole = Template(tokenizer, loss_scale="react").encode(row)
    size = len(whole["input_ids"]) - 5
    for strategy, part in (("left", slice(5, None)), ("right", slice(size))):
        options = {"max_length": size, "truncation_strategy": strategy}
        cut = Template(tokenizer, loss_scale="react", **options).encode(row)
        assert cut["loss_scale"] == whole["loss_scale"][part]
