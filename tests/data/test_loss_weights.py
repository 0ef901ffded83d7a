"""--loss_scale: how text is divided by weight."""

import pytest

from swiftmeg.data.template.loss_weights import LossScale
from swiftmeg.errors import UserError


def parts(flag, text):
    return [(text[a:b], weight) for a, b, weight in LossScale.parse(flag).weigh(text, 0, len(text))]


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("react", "no keyword", [("no keyword", 1)]),
        ("react", "", []),
        ("react", "Action: a\nThought: b", [("Action: a\n", 2), ("Thought: b", 1)]),
        ("react", "Observation: x Action: y", [("Observation:", 2), ("Action: y", 2)]),
        ("react", "Next: a Action Input: b", [("Next: a ", 1), ("Action Input: b", 2)]),
        ("alpha_umi", "so\nNext: caller.", [("so\n", 1), ("Next: caller.", 2)]),
        (
            "qwen",
            "a✿FUNCTION✿: f\n✿ARGS✿: {}\n✿RESULT✿: r\n✿RETURN✿: end",
            [("a", 1), ("✿FUNCTION✿: f\n✿ARGS✿: {}\n✿RESULT✿:", 2), ("✿RETURN✿: end", 1)],
        ),
        (
            "hermes",
            "so <tool_call>\n{}\n</tool_call>\n<tool_call>b</tool_call>",
            [
                ("so ", 1),
                ("<tool_call>\n{}\n</tool_call>", 2),
                ("\n", 1),
                ("<tool_call>b</tool_call>", 2),
            ],
        ),
        ("hermes", "<tool_call> never closed", [("<tool_call> never closed", 1)]),
        ("ignore_empty_think", "<think>\n\n</think>\n\nyes", [("yes", 1)]),
        ("ignore_empty_think", "\n</think>\n\nyes", [("\n</think>\n\nyes", 1)]),
        ("ignore_empty_think", "</think>\n\nyes", [("yes", 1)]),
        ("ignore_empty_think", "a <think></think>", [("a <think></think>", 1)]),
        (
            "last_round+hermes+ignore_empty_think",
            "<think>\n</think>\n\n<tool_call>a</tool_call>",
            [("<tool_call>a</tool_call>", 2)],
        ),
        (
            "react+hermes",
            "Action: <tool_call>a</tool_call>",
            [("Action: ", 2), ("<tool_call>a</tool_call>", 4)],
        ),
    ],
)  # fmt: skip
def test_text_is_divided(flag, text, expected):
    assert parts(flag, text) == expected


def test_strategies_and_weightings_are_told_apart():
    assert LossScale.parse("hermes") == LossScale("default", ("hermes",))
    assert LossScale.parse("all+qwen").strategy == "all"
    old = LossScale.parse("last_round_with_ignore_empty_think")
    assert old == LossScale.parse("last_round+ignore_empty_think")
    assert not old.weighted
    assert LossScale.parse("last_round+react").weighted


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("agentflan", "--loss_scale agentflan: agentflan, whose weights depend on the question"),
        ("hermes+all", r"--loss_scale hermes\+all: all: unknown; accepted: .* last_round\+hermes"),
        ("default+", r"--loss_scale default\+: : unknown"),
        ("Hermes", "--loss_scale Hermes: Hermes: unknown"),
    ],
)
def test_wrong_names_are_refused(flag, line):
    with pytest.raises(UserError, match=line):
        LossScale.parse(flag)
