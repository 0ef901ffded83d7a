"""Turns of conversations that a template renders alike but for their texts.

Finding the turns takes two renderings each. Conversations of the same roles mostly differ in their
texts only: then the text between the messages, and where the turns lie in it, is found once with
texts that no template treats specially. A conversation whose rendering is not exactly that text
around its own messages, or whose messages hold anything like markup, is for the general way.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from swiftmeg.data.turns import Message, Turn

_MARKUP = re.compile(r"</?[\w|]|\[/?[A-Z]|\ue0f1")
_MARKUP_SIGNS = ("<", "[", "\ue0f1")  # looked for first, as that is faster
_TEXT_KEYS = {"role", "content"}

Find = Callable[[list[Message]], tuple[str, list[Turn]]]


class _Shape(NamedTuple):
    between: list[str]
    """The text before, between and behind the messages."""
    turns: list[tuple[int, int, int, bool]]
    """Of each turn: its message, characters before and behind its text, whether it is trained."""


class Shapes:
    """Remembers where turns lie; `find` is the general way, for which all that it depends on but
    the messages is fixed."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._known: dict[tuple[str, ...], _Shape | None] = {}

    def turns(self, messages: Sequence[Message], text: str) -> list[Turn] | None:
        """Return the turns in `text`, the rendered messages; None where that takes the general way.

        Raises what `find` raises.
        """
        if any(message.keys() != _TEXT_KEYS or _marked(message["content"]) for message in messages):
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


def _marked(text: str) -> bool:
    return any(sign in text for sign in _MARKUP_SIGNS) and _MARKUP.search(text) is not None


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
