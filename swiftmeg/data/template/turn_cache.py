"""Turns of conversations that a template renders alike but for their texts.

Finding the turns takes two renderings each. Conversations of the same roles mostly differ in their
texts only: then the text between the messages, and where the turns lie in it, is found once with
texts that no template treats specially. A conversation whose rendering is not exactly that text
around its own messages, or whose messages hold anything like markup, is for the general way.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from swiftmeg.data.turns import Message, Turn

_PROBE_MARKS = ("\ue0f1", "\ue0f2")
_QUOTED = re.compile(r"'([^'\n]*)'|\"([^\"\n]*)\"")
_THINKING_AND_TOOLS = ("<think", "</think", "<tool", "</tool")
_TEXT_KEYS = {"role", "content"}

Find = Callable[[list[Message]], tuple[str, list[Turn]]]


class _Shape(NamedTuple):
    between: list[str]
    """The text before, between and behind the messages."""
    turns: list[tuple[int, int, int, bool]]
    """Of each turn: its message, characters before and behind its text, whether it is trained."""


class Shapes:
    """Remembers where turns lie; `find` is the general way, for which all that it depends on but
    the messages is fixed. `markup` are the strings that the template may look for in a text."""

    def __init__(self, find: Find, markup: Iterable[str] = ()) -> None:
        self._find = find
        strings = {*_PROBE_MARKS, *_THINKING_AND_TOOLS, *markup}
        self._markup = re.compile("|".join(sorted(map(re.escape, strings), key=len)))
        self._known: dict[tuple[str, ...], _Shape | None] = {}

    def turns(self, messages: Sequence[Message], text: str) -> list[Turn] | None:
        """Return the turns in `text`, the rendered messages; None where that takes the general way.

        Raises what `find` raises.
        """
        if any(
            message.keys() != _TEXT_KEYS or self._markup.search(message["content"])
            for message in messages
        ):
            return None
        roles = tuple(message["role"] for message in messages)
        if roles not in self._known:
            self._known[roles] = self._learn(roles)
        shape = self._known[roles]
        if shape is None:
            return None
        contents = [message["content"] for message in messages]
        for texts in (contents, [content.strip() for content in contents]):
            if text == _joined(shape.between, texts):
                return _place(shape, texts)
        return None

    def _learn(self, roles: tuple[str, ...]) -> _Shape | None:
        probes = [f"\ue0f1{number}\ue0f2" for number in range(len(roles))]
        text, turns = self._find(
            [{"role": role, "content": probe} for role, probe in zip(roles, probes, strict=True)]
        )
        if any(text.count(probe) != 1 for probe in probes):
            return None
        places = [text.index(probe) for probe in probes]
        ends = [place + len(probe) for place, probe in zip(places, probes, strict=True)]
        if places != sorted(places):
            return None
        assistant = [number for number, role in enumerate(roles) if role == "assistant"]
        between = [text[a:b] for a, b in zip([0, *ends], [*places, len(text)], strict=True)]
        located = [
            (number, places[number] - turn.start, turn.end - ends[number], turn.trained)
            for number, turn in zip(assistant[-len(turns) :], turns, strict=True)
        ]
        return _Shape(between, located)


def quoted_markup(jinja: str) -> set[str]:
    """The strings that stand in quotes in a template and are more than a word or white space."""
    found = {(a or b).replace("\\n", " ").strip() for a, b in _QUOTED.findall(jinja)}
    return {text for text in found if len(text) > 1 and not text.isalnum()}


def _joined(between: list[str], texts: list[str]) -> str:
    parts = [part for pair in zip(between, texts, strict=False) for part in pair]
    return "".join([*parts, between[-1]])


def _place(shape: _Shape, texts: list[str]) -> list[Turn]:
    starts, at = [], 0
    for before, text in zip(shape.between, texts, strict=False):
        starts.append(at + len(before))
        at += len(before) + len(text)
    return [
        Turn(starts[number] - before, starts[number] + len(texts[number]) + behind, trained)
        for number, before, behind, trained in shape.turns
    ]
