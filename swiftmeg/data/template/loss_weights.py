"""--loss_scale: which text is trained, and with which weight.

`STRATEGY`, or weightings joined by `+` behind it: `last_round+hermes`. The weightings and their
numbers are Megatron-SWIFT's; the idea is that of ModelScope-Agent (arXiv:2309.00986).
"""

import re
from dataclasses import dataclass, field

from swiftmeg.errors import UserError

Weighted = tuple[int, int, float]
"""Characters `[start, end)` and their weight."""

STRATEGIES = ("default", "last_round", "all")
"""All assistant turns, the last one, or everything."""

_REACT = {
    "Action:": (2.0, 2.0),
    "Action Input:": (2.0, 2.0),
    "Thought:": (1.0, 1.0),
    "Final Answer:": (1.0, 1.0),
    "Observation:": (2.0, 0.0),
}

KEYWORDS: dict[str, dict[str, tuple[float, float]]] = {
    "react": _REACT,
    "alpha_umi": {**_REACT, "Next:": (2.0, 2.0)},
    "qwen": {
        "✿FUNCTION✿:": (2.0, 2.0),
        "✿ARGS✿:": (2.0, 2.0),
        "✿RETURN✿:": (1.0, 1.0),
        "✿RESULT✿:": (2.0, 0.0),
    },
}
"""The weights of a keyword and of the text behind it, up to the next one."""

PATTERNS: dict[str, list[tuple[str, float]]] = {
    "hermes": [(r"<tool_call>.+?</tool_call>", 2.0)],
    "ignore_empty_think": [(r"\A(?:<think>\s*)?</think>\s*", 0.0)],
}
"""The weight of text that matches."""

_OPENED = re.compile(r"<think>\s*\Z")
_LOOK_BACK = 32

_OLD_NAMES = {"last_round_with_ignore_empty_think": "last_round+ignore_empty_think"}


@dataclass(frozen=True)
class LossScale:
    """A parsed --loss_scale."""

    strategy: str = "default"
    weightings: tuple[str, ...] = field(default=())

    @classmethod
    def parse(cls, text: str) -> "LossScale":
        """UserError for a name that is unknown, or stands in a wrong place."""
        first, *others = _OLD_NAMES.get(text, text).split("+")
        names = others if first in STRATEGIES else [first, *others]
        for name in names:
            if name == "agentflan":
                raise UserError(
                    f"--loss_scale {text}: agentflan, whose weights depend on the question, is not "
                    "supported: use react"
                )
            if name not in KEYWORDS and name not in PATTERNS:
                raise UserError(
                    f"--loss_scale {text}: {name}: unknown; accepted: {', '.join(STRATEGIES)}, "
                    f"{', '.join([*KEYWORDS, *PATTERNS])}, and these behind a strategy, as in "
                    "last_round+hermes"
                )
        return cls(first if first in STRATEGIES else "default", tuple(names))

    @property
    def name(self) -> str:
        """The flag's value, whole."""
        return "+".join([self.strategy, *self.weightings])

    @property
    def weighted(self) -> bool:
        """Whether some text has another weight than 1 or 0."""
        return any(name != "ignore_empty_think" for name in self.weightings)

    def weigh(self, text: str, start: int, end: int) -> list[Weighted]:
        """Divide `text[start:end]`, one turn, by weight; what has none (0) is left out.

        Where several weightings name the same text, their weights are multiplied.
        """
        parts = [(start, end, 1.0)]
        if "ignore_empty_think" in self.weightings:
            parts = [(_behind_empty_think(text, start, end), end, 1.0)]
        for name in self.weightings:
            parts = [
                (first, last, weight * factor)
                for a, b, weight in parts
                for first, last, factor in _divide(name, text[a:b], a)
            ]
        joined: list[Weighted] = []
        for a, b, weight in parts:
            if joined and joined[-1][1:] == (a, weight):
                joined[-1] = (joined[-1][0], b, weight)
            elif b > a and weight:
                joined.append((a, b, weight))
        return joined


def _behind_empty_think(text: str, start: int, end: int) -> int:
    """Return where a turn goes on whose thinking the generation prompt opens and that has none."""
    if not _OPENED.search(text, max(start - _LOOK_BACK, 0), start):
        return start
    closed = re.compile(r"\s*</think>\s*").match(text, start, end)
    return closed.end() if closed else start


def _divide(name: str, text: str, offset: int) -> list[Weighted]:
    """Cover `text`, which begins at `offset`, by parts with the weights of one weighting."""
    parts: list[Weighted] = []
    at, behind = 0, 1.0
    for start, end, weight, following in _found(name, text):
        parts += [(at, start, behind), (start, end, weight)]
        at, behind = end, following
    return [(a + offset, b + offset, weight) for a, b, weight in [*parts, (at, len(text), behind)]]


def _found(name: str, text: str) -> list[tuple[int, int, float, float]]:
    """Where the weighting's text is, its weight and that of what follows."""
    if name in KEYWORDS:
        words = KEYWORDS[name]
        matches = re.finditer("|".join(map(re.escape, sorted(words, reverse=True))), text)
        return [(*match.span(), *words[match[0]]) for match in matches]
    return [
        (*match.span(), weight, 1.0)
        for pattern, weight in PATTERNS[name]
        for match in re.finditer(pattern, text, re.DOTALL)
    ]
