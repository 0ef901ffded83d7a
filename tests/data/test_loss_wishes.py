"""Messages that say themselves whether they are trained, against spans of the rendered text."""

import itertools
import json

import pytest

from swiftmeg.data.encoded.encode import encode_rows
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.standard_row import RowError
from swiftmeg.data.template.template import Template
from tests.data.test_template import TOOLED

FIRST = {"name": "look", "arguments": {"at": "sky"}}
SECOND = {"name": "go", "arguments": {"to": "été"}}


def say(role, content, **keys):
    return {"role": role, "content": content, **keys}


def call(of, **keys):
    return {"role": "tool_call", "content": json.dumps(of), **keys}


def trained(template, messages, **columns):
    """The trained stretches of a row, and the ids, which a wish must not change."""
    encoded = template.encode({"messages": messages, **columns})
    bare = [{k: v for k, v in message.items() if k != "loss"} for message in messages]
    assert (
        encoded["input_ids"] == Template(template.tokenizer).encode({"messages": bare})["input_ids"]
    )
    groups = itertools.groupby(
        zip(encoded["labels"], encoded["input_ids"], strict=True), lambda pair: pair[0] != -100
    )
    return [template.tokenizer.decode([i for _, i in group]) for kept, group in groups if kept]


def turns(*losses, user=None):
    """Two rounds whose assistant turns have the given wishes."""
    messages = []
    for number, loss in enumerate(losses, 1):
        asked = {"loss": user} if user is not None else {}
        messages.append(say("user", f"q{number}", **asked))
        messages.append(say("assistant", f"a{number}", **({} if loss is None else {"loss": loss})))
    return messages


@pytest.mark.parametrize(
    ("loss_scale", "losses", "expected"),
    [
        ("default", (False, None), ["a2"]),
        ("default", (None, False), ["a1"]),
        ("default", (True, False), ["a1"]),
        ("last_round", (True, None), ["a1", "a2"]),
        ("last_round", (True, False), ["a1"]),
        ("last_round", (None, None, True), ["a3"]),
        ("last_round", (None, True, None), ["a2", "a3"]),
    ],
)
@pytest.mark.parametrize("name", ["chatml", "headers", "returns"])
def test_a_wish_decides_over_the_strategy(
    make_tokenizer, templates, name, loss_scale, losses, expected
):
    template = Template(make_tokenizer(getattr(templates, name)), loss_scale=loss_scale)
    ends = {"chatml": "<|im_end|>", "headers": "<|eot_id|>", "returns": "<|im_end|>"}
    found = [text.replace("<|return|>", "<|im_end|>") for text in trained(template, turns(*losses))]
    assert found == [text + ends[name] for text in expected]


def test_other_roles_are_trained_where_they_say_so(make_tokenizer, templates):
    template = Template(make_tokenizer(templates.chatml))
    messages = [say("system", "S", loss=True), *turns(None, user=True)]
    assert trained(template, messages) == ["S<|im_end|>", "q1<|im_end|>", "a1<|im_end|>"]
    messages = [say("system", "S", loss=False), *turns(None, user=False)]
    assert trained(template, messages) == ["a1<|im_end|>"]


def test_all_trains_everything_else(make_tokenizer, templates):
    template = Template(make_tokenizer(templates.chatml), loss_scale="all")
    start, middle, end = trained(template, turns(False, False))
    assert start.endswith("q1<|im_end|>\n<|im_start|>assistant\n")
    assert middle == "\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    assert end == "\n"
    plain = Template(template.tokenizer, loss_scale="all", use_chat_template=False)
    row = {"messages": [say("assistant", "one ", loss=False), say("assistant", "two")]}
    labels = plain.encode(row)["labels"]
    assert plain.tokenizer.decode([label for label in labels if label != -100]) == "two</s>"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([call(FIRST, loss=False)], []),
        ([call(FIRST), call(SECOND, loss=False)], ["1"]),
        ([call(FIRST, loss=False), call(SECOND)], ["2|"]),
        ([call(FIRST, loss=False), call(SECOND, loss=False)], []),
        ([say("assistant", "hm", loss=False), call(FIRST)], ["1|"]),
        ([say("assistant", "hm", loss=True), call(FIRST, loss=False)], ["hm"]),
        ([say("assistant", "hm"), call(FIRST, loss=False), call(SECOND)], ["hm", "2|"]),
        ([say("assistant", "hm", loss=False), call(FIRST), call(SECOND)], ["12|"]),
    ],
)
def test_parts_of_a_turn_with_tool_calls(make_tokenizer, messages, expected):
    template = Template(make_tokenizer(TOOLED))
    texts = {
        "1": f"<tool_call>{json.dumps(FIRST)}</tool_call>",
        "2": f"<tool_call>{json.dumps(SECOND, ensure_ascii=False)}</tool_call>",
        "|": "<|im_end|>",
    }
    row = [say("user", "q"), *messages, say("tool_response", "blue"), say("assistant", "end")]
    wanted = ["".join(texts.get(c, c) for c in text) for text in expected]
    assert trained(template, row) == [*wanted, "end<|im_end|>"]


def test_nothing_wanted_is_a_bad_row(make_tokenizer, templates):
    with pytest.raises(RowError, match="no token to train"):
        Template(make_tokenizer(templates.chatml)).encode({"messages": turns(False, False)})


def test_a_turn_whose_thinking_is_stripped_is_trained_as_it_is_shown_if_asked(
    make_tokenizer, templates
):
    template = Template(make_tokenizer(templates.thinking))
    messages = turns(True, None)
    messages[1]["content"] = "<think>\nhm\n</think>\n\na1"
    assert trained(template, messages)[0] == "a1"
    assert not template.counts["context_only_turns"]


@pytest.mark.parametrize("key", ["loss", "weight"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_wishes_come_from_files(tmp_path, make_tokenizer, templates, key, kind):
    rows = []
    for index in range(4):
        messages = [say("user", f"q{index}"), say("assistant", "one"), say("user", "more")]
        rows.append({"messages": [*messages, say("assistant", "two")]})
        if index % 2:
            rows[-1]["messages"][1][key] = 0 if key == "weight" else False
        if index == 3:
            rows[-1]["messages"][3][key] = 1 if key == "weight" else True
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import csv

        with path.open("w") as file:
            writer = csv.DictWriter(file, ["messages"])
            writer.writeheader()
            writer.writerows({"messages": json.dumps(row["messages"])} for row in rows)
    loaded, _ = load_rows([str(path)], dataset_shuffle=False)
    tokenizer = make_tokenizer(templates.chatml)
    encoded = encode_rows(loaded, Template(tokenizer))
    found = [tokenizer.decode([i for i in row["labels"] if i != -100]) for row in encoded]
    assert found == [f"{first}two<|im_end|>" for first in ("one<|im_end|>", "") * 2]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"loss": "yes"}, "loss of a message is neither 0 nor 1"),
        ({"loss": 0.5}, "loss of a message is neither 0 nor 1"),
        ({"weight": 2}, "weight of a message is neither 0 nor 1"),
        ({"loss": True, "weight": 0}, "loss and weight of a message contradict each other"),
    ],
)
def test_a_wish_that_is_none(tmp_path, keys, reason, caplog):
    good = [say("user", "q"), say("assistant", "a")]
    rows = [{"messages": good}, {"messages": [good[0], {**good[1], **keys}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO"):
        loaded, _ = load_rows([str(tmp_path / "rows.jsonl")])
    assert len(loaded) == 1
    assert reason in caplog.text


def test_keys_that_nothing_reads_are_named_once_and_counted(tmp_path, caplog):
    message = say("assistant", "a", loss=True, audio={"id": "x"}, refusal=None)
    rows = [{"messages": [say("user", "q", weight=1), message]}] * 1500
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_rows([str(tmp_path / "rows.jsonl")], dataset_num_proc=2)
    said = [r.getMessage() for r in caplog.records if "not read" in r.getMessage()]
    (line,) = said
    assert set(line.partition("not read: ")[2].split(", ")) == {
        "weight (in 1,500)",
        "audio (in 1,500)",
    }
