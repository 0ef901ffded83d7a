"""Megatron's `moe_layer_freq`: which layers have experts, read by a grammar.

    sum     = product { "+" product }
    product = factor { "*" factor }
    factor  = number | "[" number { "," number } [ "," ] "]" | "(" sum ")"

As in Python, lists are joined by `+` and repeated by `*`, in either order.
"""

import re
from typing import Any

_TOKENS = re.compile(r"[0-9]{1,6}|[\[\](),+*]")

_LONGEST = 10_000
"""No model has more layers."""

_DEEPEST = 20
"""Brackets within brackets."""


def layer_pattern(value: Any, layers: int) -> list[int] | None:
    """`value` as 1 for each of `layers` layers with experts and 0 for others.

    Returns None for what is no pattern.
    """
    if isinstance(value, list | tuple):
        return [int(entry) for entry in value]
    text = re.sub(r"\s", "", str(value))
    tokens = _TOKENS.findall(text)
    if "".join(tokens) != text:
        return None
    try:
        found = _Reader(tokens).read()
    except ValueError:
        return None
    if isinstance(found, int):
        return [int(layer % found == 0) for layer in range(layers)] if found > 0 else None
    return found


class _Reader:
    """Reads tokens from the left; ValueError where they are no pattern."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.place = 0
        self.depth = 0

    def read(self) -> int | list[int]:
        """The value of all tokens."""
        found = self._sum()
        if self.place < len(self.tokens):
            raise ValueError
        return found

    def _take(self, token: str) -> bool:
        if self.place < len(self.tokens) and self.tokens[self.place] == token:
            self.place += 1
            return True
        return False

    def _need(self, token: str) -> None:
        if not self._take(token):
            raise ValueError

    def _number(self) -> int:
        if self.place == len(self.tokens) or not self.tokens[self.place].isdecimal():
            raise ValueError
        self.place += 1
        return int(self.tokens[self.place - 1])

    def _sum(self) -> int | list[int]:
        found = self._product()
        while self._take("+"):
            more = self._product()
            if isinstance(found, int) or isinstance(more, int):
                raise ValueError
            _check_length(len(found) + len(more))
            found = found + more
        return found

    def _product(self) -> int | list[int]:
        found = self._factor()
        while self._take("*"):
            times = self._factor()
            if isinstance(found, int):
                found, times = times, found
            if isinstance(found, int) or not isinstance(times, int):
                raise ValueError
            _check_length(len(found) * times)
            found = found * times
        return found

    def _factor(self) -> int | list[int]:
        if self._take("("):
            self.depth += 1
            if self.depth > _DEEPEST:
                raise ValueError
            found = self._sum()
            self._need(")")
            self.depth -= 1
            return found
        if not self._take("["):
            return self._number()
        entries = [self._number()]
        while self._take(","):
            if self._take("]"):
                return entries
            entries.append(self._number())
        self._need("]")
        return entries


def _check_length(length: int) -> None:
    if length > _LONGEST:
        raise ValueError
