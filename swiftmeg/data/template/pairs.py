"""Preference pairs: a chosen and a rejected answer to the same prompt, as DPO compares them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from swiftmeg.data.standard_row import Row, RowError, messages_of
from swiftmeg.data.template.template import IGNORE, Encoded, Template
from swiftmeg.data.tools import check_answered, to_chat
from swiftmeg.data.turns import Message
from swiftmeg.errors import UserError

LOSS_SCALES = ("default", "last_round", "ignore_empty_think", "last_round_with_ignore_empty_think")


class Pair(NamedTuple):
    """Both sides of a pair as tokens; see `PairTemplate.encode_many`."""

    chosen: Encoded
    rejected: Encoded


class Conversations(NamedTuple):
    """Both sides of a row, and how many of their last assistant turns are compared."""

    chosen: list[Message]
    rejected: list[Message]
    chosen_turns: int
    rejected_turns: int


class PairTemplate:
    """Turns rows with `rejected_response` or `rejected_messages` into pairs of token sequences.

    Takes the arguments of `Template`. Trained, that is compared, are the assistant turns from the
    first one that differs, which mostly is the last: everything before is the shared prompt. So
    `loss_scale` only says whether empty thinking is left out. With `ld_alpha` (LD-DPO,
    arXiv:2409.06411) tokens have weights: of the longer answer, those beyond the length of the
    shorter one count so much.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        loss_scale: str = "default",
        ld_alpha: float | None = None,
        **options: Any,
    ) -> None:
        if loss_scale not in LOSS_SCALES:
            raise UserError(
                f"--loss_scale {loss_scale}: pairs compare answers; accepted: "
                f"{', '.join(LOSS_SCALES)}"
            )
        self._ld_alpha = ld_alpha
        self.weighted = ld_alpha is not None
        """Whether tokens have weights."""
        self._max_length = options.pop("max_length", None)
        self.vocab_size = options.pop("vocab_size", None)
        self._limit = Template(
            tokenizer, max_length=self._max_length, vocab_size=self.vocab_size, **options
        )
        think = loss_scale.endswith("ignore_empty_think")
        # Two, because the last turn can be told apart where earlier ones cannot.
        self._last = Template(
            tokenizer,
            loss_scale="last_round_with_ignore_empty_think" if think else "last_round",
            **options,
        )
        self._all = Template(
            tokenizer, loss_scale="ignore_empty_think" if think else "default", **options
        )

    @property
    def counts(self) -> Counter[str]:
        """What `Template` counts, of both ways to encode a side."""
        return self._last.counts + self._all.counts

    @property
    def may_exceed_vocabulary(self) -> bool:
        """Whether the tokenizer has tokens that the model does not have."""
        return self._limit.may_exceed_vocabulary

    def identity(self) -> dict[str, Any]:
        """Return all that decides the outcome of `encode_many`, as JSON-able values."""
        return {
            "pairs": self._all.identity(),
            "max_length": self._max_length,
            "ld_alpha": self._ld_alpha,
            "vocab_size": self.vocab_size,
        }

    def encode(self, row: Row) -> dict[str, dict[str, Any]]:
        """Return `chosen` and `rejected` of one standard row, items as those of a PairDataset.

        Raises RowError if the row cannot be used, UserError if the template cannot.
        """
        try:
            pair = self._encode(row)
        except UserError as error:
            raise UserError(f"{row.get('origin', 'a row')}: {error}") from None
        items = {}
        for name, side in pair._asdict().items():
            arrays = {key: value for key, value in side._asdict().items() if value is not None}
            items[name] = {**arrays, "length": len(side.input_ids)}
        return items

    def encode_many(self, rows: Sequence[Row]) -> list[Pair | RowError | UserError]:
        """Return each standard row's pair, or why there is none.

        Both sides have `input_ids` and `labels`, int32 [length], with the label -100 on the prompt.
        Under `--truncation_strategy left` both lose as many tokens, so that they share what is left
        of the prompt. A side without a token to train makes the row a bad one, and so do sides that
        are equal, be it because they were cut.
        """
        return [self._outcome(row) for row in rows]

    def _outcome(self, row: Row) -> Pair | RowError | UserError:
        try:
            return self._encode(row)
        except (RowError, UserError) as error:
            return error

    def _encode(self, row: Row) -> Pair:
        both = conversations(row)
        sides = []
        for messages, turns in (
            (both.chosen, both.chosen_turns),
            (both.rejected, both.rejected_turns),
        ):
            template = self._last if turns == 1 else self._all
            side = {"messages": messages, "tools": row.get("tools")}
            (outcome,) = template.encode_many([side], last_turns=turns)
            if not isinstance(outcome, Encoded):
                raise outcome
            sides.append(outcome)
        if np.array_equal(sides[0].input_ids, sides[1].input_ids):
            raise RowError("the rejected answer equals the chosen one")
        longest = max(len(side.input_ids) for side in sides)
        pair = Pair(*(self._limit.fit_to(side, longest) for side in sides))
        if np.array_equal(pair.chosen.input_ids, pair.rejected.input_ids):
            raise RowError("cut to --max_length, the rejected answer equals the chosen one")
        return pair if self._ld_alpha is None else _with_length_weights(pair, self._ld_alpha)


def _with_length_weights(pair: Pair, ld_alpha: float) -> Pair:
    """Give trained tokens behind as many as the shorter answer has the weight `ld_alpha`."""
    trained = [side.labels != IGNORE for side in pair]
    shared = min(int(each.sum()) for each in trained)
    return Pair(
        *(
            side._replace(
                loss_scale=np.where(each & (each.cumsum() > shared), ld_alpha, 1).astype(np.float32)
            )
            for side, each in zip(pair, trained, strict=True)
        )
    )


def conversations(row: Row) -> Conversations:
    """Return both sides of a standard row, in its form; raises RowError for a broken pair."""
    chosen = messages_of(row)
    if row.get("rejected_messages") is not None:
        rejected = messages_of(row, "rejected_messages")
        if chosen[0]["role"] == "system" and rejected[0]["role"] != "system":
            rejected.insert(0, chosen[0])
    elif row.get("rejected_response") is not None:
        rejected = [*_without_answer(chosen), _answer(row["rejected_response"])]
    else:
        raise RowError("no rejected_response or rejected_messages")
    sides = [to_chat(chosen), to_chat(rejected)]
    check_answered(sides[0])
    try:
        check_answered(sides[1])
    except RowError as error:
        raise RowError(f"rejected_messages: {error.reason}", error.detail) from None
    same = next(
        (k for k, (a, b) in enumerate(zip(*sides, strict=False)) if a != b),
        min(map(len, sides)),
    )
    if same == len(sides[0]) == len(sides[1]):
        raise RowError("the rejected answer equals the chosen one")
    asked = [[message for message in side if message["role"] == "user"] for side in sides]
    answers = [side[same]["role"] if same < len(side) else "none" for side in sides]
    if answers != ["assistant", "assistant"] or asked[0] != asked[1]:
        raise RowError("rejected_messages have another prompt", f"message {same + 1}")
    turns = [sum(message["role"] == "assistant" for message in side[same:]) for side in sides]
    return Conversations(chosen, rejected, *turns)


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _without_answer(messages: list[Message]) -> list[Message]:
    """Leave out the assistant's last turn: its text and its tool calls."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "tool_call":
        end -= 1
    if end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
