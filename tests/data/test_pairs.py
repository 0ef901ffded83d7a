"""Preference pairs: both sides against the template's rendering of prefixes, and broken pairs."""

import numpy as np
import pytest
from datasets import Dataset

from swiftmeg.data.encoded.encode import encode_pairs
from swiftmeg.data.encoded.lazy import LazyDataset
from swiftmeg.data.encoded.packing import PackedDataset, tokens_of
from swiftmeg.data.standard_row import RowError, RowTooLong
from swiftmeg.data.template.pairs import Pair, PairTemplate
from swiftmeg.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "tool_call", "content": '{"name": "look", "arguments": {}}'}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat(*messages, rejected=None, **columns):
    if isinstance(rejected, str):
        columns["rejected_response"] = rejected
    elif rejected is not None:
        columns["rejected_messages"] = rejected
    return {"messages": list(messages), **columns}


def pair_of(tokenizer, row, **options):
    (outcome,) = PairTemplate(tokenizer, **options).encode_many([row])
    if not isinstance(outcome, Pair):
        raise outcome
    return outcome


def check_side(tokenizer, side, messages, prompt):
    """Ids of the whole conversation; trained from behind the prompt up to a last line break."""
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    end = len(ids)
    while not tokenizer.decode(ids[end - 1 : end]).strip():
        end -= 1
    assert side.input_ids.tolist() == ids
    labels = [token if start <= k < end else -100 for k, token in enumerate(ids)]
    assert side.labels.tolist() == labels


@pytest.mark.parametrize("name", ["chatml", "headers", "returns", "thinking"])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
@pytest.mark.parametrize("before", [[], [user("a b"), assistant("first answer")]])
@pytest.mark.parametrize(
    "answers", [("yes", "no"), ("the same begin", "the same end 你好"), ("", "x")]
)
def test_both_sides_are_those_of_prefixes(make_tokenizer, templates, name, system, before, answers):
    tokenizer = make_tokenizer(getattr(templates, name))
    prompt = [*system, *before, user("Who are you?")]
    chosen, rejected = ([*prompt, assistant(text)] for text in answers)
    found = pair_of(tokenizer, chat(*chosen, rejected=answers[1]))
    for side, messages in zip(found, (chosen, rejected), strict=True):
        check_side(tokenizer, side, messages, prompt)
    # The whole conversation says the same, with or without the system message.
    whole = pair_of(tokenizer, chat(*chosen, rejected=rejected))
    without = pair_of(tokenizer, chat(*chosen, rejected=rejected[len(system) :]))
    for other in (whole, without):
        for a, b in zip(found, other, strict=True):
            assert np.array_equal(a.input_ids, b.input_ids)
            assert np.array_equal(a.labels, b.labels)


def test_answers_are_compared_from_the_first_that_differs(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    shared = [user("a"), assistant("same"), user("b")]
    chosen = [*shared, assistant("good"), user("c"), assistant("fine")]
    rejected = [*shared, assistant("bad"), user("c"), assistant("fine")]
    found = pair_of(tokenizer, chat(*chosen, rejected=rejected))
    texts = [tokenizer.decode(side.labels[side.labels != -100].tolist()) for side in found]
    assert texts == ["good<|im_end|>fine<|im_end|>", "bad<|im_end|>fine<|im_end|>"]


def test_a_rejected_response_takes_the_place_of_text_and_calls(make_tokenizer, templates):
    tokenizer = make_tokenizer(
        templates.chatml.replace(
            "m.content +", "m.content + (m.tool_calls | tojson if m.tool_calls else '') +"
        )
    )
    row = chat(user("a"), assistant("let me"), CALL, CALL, rejected="no idea")
    found = pair_of(tokenizer, row)
    texts = [tokenizer.decode(side.labels[side.labels != -100].tolist()) for side in found]
    assert "look" in texts[0]
    assert texts[0].startswith("let me")
    assert texts[1] == "no idea<|im_end|>"


def test_empty_thinking_can_be_left_out(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    row = chat(user("a"), assistant("<think>\n\n</think>\n\nyes"), rejected="no")
    found = pair_of(tokenizer, row, loss_scale="ignore_empty_think")
    assert tokenizer.decode(found[0].labels[found[0].labels != -100].tolist()) == "yes<|im_end|>"
    with pytest.raises(UserError, match=r"--loss_scale all: pairs compare answers; accepted: "):
        PairTemplate(tokenizer, loss_scale="all")


@pytest.mark.parametrize("rejected", ["no", "no, and much more than that"])
def test_both_sides_keep_the_same_prompt_when_cut(make_tokenizer, templates, rejected):
    tokenizer = make_tokenizer(templates.chatml)
    row = chat(user("Who are you? " * 5), assistant("yes " * 7), rejected=rejected)
    whole = pair_of(tokenizer, row)
    sizes = [len(side.input_ids) for side in whole]
    limit = max(sizes) - 9
    left = pair_of(tokenizer, row, max_length=limit, truncation_strategy="left")
    assert [len(side.input_ids) for side in left] == [size - 9 for size in sizes]
    for a, b in zip(whole, left, strict=True):
        assert np.array_equal(a.labels[9:], b.labels)
    right = pair_of(tokenizer, row, max_length=limit, truncation_strategy="right")
    assert [len(side.input_ids) for side in right] == [min(size, limit) for size in sizes]
    with pytest.raises(RowTooLong, match=f"longer than --max_length {limit} .{max(sizes)} tokens"):
        pair_of(tokenizer, row, max_length=limit)
    with pytest.raises(RowError, match="no token to train"):
        pair_of(tokenizer, row, max_length=10, truncation_strategy="right")


BROKEN = {
    "no rejected_response or rejected_messages": chat(user("a"), assistant("yes")),
    "the rejected answer equals the chosen one": chat(user("a"), assistant("yes"), rejected="yes"),
    "rejected_messages have another prompt": chat(
        user("a"), assistant("yes"), rejected=[user("b"), assistant("no")]
    ),
    "rejected_messages: the last message is not the assistant's": chat(
        user("a"), assistant("yes"), rejected=[user("a"), assistant("no"), user("b")]
    ),
    "rejected_messages: no assistant turn": chat(user("a"), assistant("yes"), rejected=[user("a")]),
}
MORE_BROKEN = [
    # The same up to its end, another system message, other questions behind the answer.
    chat(
        *(user("a"), assistant("yes"), user("b"), assistant("c")),
        rejected=[user("a"), assistant("yes")],
    ),
    chat(user("a"), assistant("yes"), rejected=[SYSTEM, user("a"), assistant("no")]),
    chat(
        *(user("a"), assistant("yes"), user("b"), assistant("c")),
        rejected=[user("a"), assistant("no"), user("x"), assistant("c")],
    ),
]


def test_broken_pairs_are_named_and_counted(make_tokenizer, templates, caplog, tmp_path):
    template = PairTemplate(make_tokenizer(templates.chatml))
    good = [chat(user(f"q{k}"), assistant("yes " * k), rejected=f"no {k}") for k in range(1, 6)]
    rows = [*good[:2], *BROKEN.values(), *good[2:], *MORE_BROKEN]
    columns = ("messages", "rejected_response", "rejected_messages")
    data = Dataset.from_list(
        [
            {**{name: row.get(name) for name in columns}, "origin": f"f:{number}"}
            for number, row in enumerate(rows, 1)
        ]
    )
    with caplog.at_level("INFO", logger="swiftmeg"):
        pairs = encode_pairs(data.select([*range(len(rows))][::-1]), template)
    assert len(pairs) == len(good)
    text = caplog.text
    assert f"{len(rows)} rows: 5 kept, 8 dropped: " in text
    for number, reason in enumerate(BROKEN, 3):
        count = 4 if "another prompt" in reason else 1
        assert f"{count} x {reason} (first: f:{number}" in text
    for item, row in zip(pairs, good[::-1], strict=True):
        found = pair_of(template._all.tokenizer, row)
        for name, side in zip(("chosen", "rejected"), found, strict=True):
            assert item[name]["input_ids"].tolist() == side.input_ids.tolist()
            assert item[name]["labels"].tolist() == side.labels.tolist()
    assert pairs.lengths().tolist() == [
        len(item["chosen"]["input_ids"]) + len(item["rejected"]["input_ids"]) for item in pairs
    ]
    with pytest.raises(UserError, match="--strict true: f:3: no rejected_response"):
        encode_pairs(data, template, strict=True, cache_dir=str(tmp_path / "other"))


def test_a_template_that_trims_makes_answers_equal(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.headers)
    with pytest.raises(RowError, match="the rejected answer equals the chosen one"):
        pair_of(tokenizer, chat(user("a"), assistant("yes"), rejected="yes "))


def test_sides_that_truncation_makes_equal_are_dropped(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    row = chat(user("a"), assistant("the same words and then yes"), rejected="the same words: no")
    size = len(pair_of(tokenizer, row).chosen.input_ids)
    reason = "cut to --max_length, the rejected answer equals the chosen one"
    found = []
    for limit in range(5, size):
        try:
            pair = pair_of(tokenizer, row, max_length=limit, truncation_strategy="right")
        except RowError as error:
            found.append(error.reason)
        else:
            assert not np.array_equal(*(side.input_ids for side in pair))
            found.append("kept")
    assert set(found) == {"no token to train", reason, "kept"}
    assert found == sorted(found, key=["no token to train", reason, "kept"].index)


@pytest.mark.parametrize("strategy", ["delete", "left", "right"])
def test_tokens_beyond_the_shorter_answer_can_count_less(make_tokenizer, templates, strategy):
    """LD-DPO: ld_alpha."""
    tokenizer = make_tokenizer(templates.chatml)
    row = chat(user("Who are you?"), assistant("yes " * 7), rejected="no no")
    options = {"truncation_strategy": strategy, "max_length": 512 if strategy == "delete" else 40}
    pair = pair_of(tokenizer, row, ld_alpha=0.25, **options)
    trained = [side.labels != -100 for side in pair]
    shared = min(each.sum() for each in trained)
    assert trained[0].sum() > shared
    for side, each in zip(pair, trained, strict=True):
        expected = [1.0] * shared + [0.25] * (each.sum() - shared)
        assert side.loss_scale[each].tolist() == expected
        assert set(side.loss_scale[~each]) == {1.0}
    assert all(side.loss_scale is None for side in pair_of(tokenizer, row, **options))


def test_weights_of_tokens_are_stored(make_tokenizer, templates):
    rows = [chat(user("a"), assistant("yes " * k), rejected="no") for k in range(1, 4)]
    template = PairTemplate(make_tokenizer(templates.chatml), ld_alpha=0.5)
    pairs = encode_pairs(Dataset.from_list(rows), template)
    for item, row in zip(pairs, rows, strict=True):
        expected = template.encode(row)
        for name in ("chosen", "rejected"):
            assert item[name].keys() == expected[name].keys()
            for key, value in expected[name].items():
                assert np.array_equal(item[name][key], value)


def test_pairs_stay_together_in_packs(make_tokenizer, templates):
    template = PairTemplate(make_tokenizer(templates.chatml), max_length=512)
    rows = [
        chat(user("a"), assistant("yes " * (k % 9)), rejected="no " * (90 if k == 7 else k % 4 + 1))
        for k in range(1, 40)
    ]
    pairs = encode_pairs(Dataset.from_list(rows), template)
    limit = int(pairs.lengths().max()) - 1  # too short for the longest
    packs = PackedDataset(pairs, limit)
    assert packs.longest == limit + 1
    seen = [pair for pack in packs for pair in pack]
    assert len(seen) == len(pairs) > len(packs)
    for items in packs:
        assert len(items) == 1 or sum(map(tokens_of, items)) <= limit
    texts = sorted(str(pair["chosen"]) + str(pair["rejected"]) for pair in pairs)
    assert sorted(str(pair["chosen"]) + str(pair["rejected"]) for pair in seen) == texts


def test_pairs_can_be_made_while_training(make_tokenizer, templates, caplog):
    template = PairTemplate(make_tokenizer(templates.chatml))
    rows = [
        {**chat(user(f"q{k}"), assistant("yes"), rejected="no" if k % 3 else "yes"), "origin": k}
        for k in range(6)
    ]
    lazy = LazyDataset(rows, template)
    with caplog.at_level("WARNING", logger="swiftmeg"):
        found = [lazy[k] for k in range(6)]
    taken = [1, 1, 2, 4, 4, 5]  # in place of a row that cannot be used, the next
    for item, place in zip(found, taken, strict=True):
        expected = template.encode(rows[place])
        for name in ("chosen", "rejected"):
            assert np.array_equal(item[name]["input_ids"], expected[name]["input_ids"])
    assert "the rejected answer equals the chosen one" in caplog.text
