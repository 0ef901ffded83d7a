"""Which messages of a conversation are trained: --loss_scale, or what messages say themselves."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from swiftmeg.data.turns import Message, Render, Turn, part_borders

Wishes = Sequence[Sequence[bool | None]]
"""For each message and each part of it, its text and its calls, whether it is to be trained; None
where nothing is said."""

Part = tuple[Turn, bool]
"""A stretch of the text, and whether it is trained."""


@dataclass(frozen=True)
class Choice:
    """What of each message is trained: as it says itself, else by --loss_scale's `strategy`.

    With `last_turns`, at most so many assistant turns are, the last ones, whatever others say.
    """

    strategy: str
    last_turns: int | None = None

    def wanted(self, messages: Sequence[Message], wishes: Wishes) -> list[list[bool]]:
        """Whether each part of each message is trained."""
        trained = set(self._by_strategy(messages))
        if self.last_turns is not None:
            said: Wishes = [w if k in trained else [False] for k, w in enumerate(wishes)]
        else:
            said = wishes
        return [
            [k in trained if wish is None else wish for wish in parts]
            for k, parts in enumerate(said)
        ]

    def _by_strategy(self, messages: Sequence[Message]) -> Sequence[int]:
        if self.strategy == "all":
            return range(len(messages))
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        count = 1 if self.strategy == "last_round" else self.last_turns
        return turns if count is None else turns[-count:]


def looked_for(strategy: str, wanted: list[list[bool]]) -> list[int]:
    """Return the messages whose places must be found: those that are trained in part or whole, or,
    where all text is, those that are not."""
    if strategy == "all":
        return [k for k, parts in enumerate(wanted) if not all(parts)]
    return [k for k, parts in enumerate(wanted) if any(parts)]


def divide(
    messages: Sequence[Message], k: int, text: str, turn: Turn, parts: list[bool], render: Render
) -> list[Part]:
    """Divide the turn of message k by whether its parts are trained."""
    if all(parts) or not any(parts):
        return [(turn, parts[0])]
    borders = [turn.start, *part_borders(messages, k, text, turn, len(parts), render), turn.end]
    spans = itertools.pairwise(borders)
    return [(Turn(a, b), part) for (a, b), part in zip(spans, parts, strict=True)]


def outside(parts: list[Part], length: int) -> list[Part]:
    """Return what of a text of `length` characters is trained, all but `parts` that are not."""
    left_out = [turn for turn, trained in parts if not trained]
    starts = [0, *(turn.end for turn in left_out)]
    ends = [*(turn.start for turn in left_out), length]
    return [(Turn(a, b), True) for a, b in zip(starts, ends, strict=True) if b > a]
