"""Patterns of layers are read by a grammar: nothing is evaluated."""

import time

import pytest

from swiftmeg.args.layer_pattern import layer_pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("1", [1, 1, 1, 1, 1]),
        ("2", [1, 0, 1, 0, 1]),
        ("[0]*2+[1]*3", [0, 0, 1, 1, 1]),
        ("2*[0] + [1,1,1]", [0, 0, 1, 1, 1]),
        ("([0]+[1]*2)*2", [0, 1, 1, 0, 1, 1]),
        ("[0, 1,]", [0, 1]),
        ("[1]*(2)*2", [1, 1, 1, 1]),
        ([0, 1], [0, 1]),
    ],
)
def test_patterns(text: object, pattern: list[int]) -> None:
    assert layer_pattern(text, 5) == pattern


@pytest.mark.parametrize(
    "text",
    [
        *("[1]*9**7", "[1]*9999999", "[1]*99999*99999", "[1]+1", "2*3", "0", "", "[", "[1", "[]"),
        *(
            "[1]]",
            "(" * 5000 + "[1]" + ")" * 5000,
            "[1]*[2]",
            "a",
            "[1].pop()",
            "-1",
            "1e9",
            "[1]+",
        ),
        *("9" * 9999, "[1" * 9999, "[٣]"),
    ],
)
def test_what_is_no_pattern(text: str) -> None:
    start = time.process_time()
    assert layer_pattern(text, 5) is None
    assert time.process_time() - start < 1
