"""Where the assistant's turns lie in a rendered conversation.

Templates say nothing about which text is the assistant's. It is found by rendering prefixes of
the conversation: what the template adds after `messages[:k]` plus the generation prompt, up to
`messages[:k+1]`, is what the model must produce in turn k. Where a prefix of the conversation is
not rendered as a prefix of the text, the place would be a guess, and the conversation is refused.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from swiftmeg.errors import UserError

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""`render(messages, add_generation_prompt)` gives the text of a conversation."""

# Private-use characters: no template treats them specially and no text is expected to hold them.
_PROBE = "\ue0f1probe\ue0f2"
_THINK_END = "</think>"

REASONING = {"reasoning_content", "reasoning", "thinking"}
"""The names under which templates know the thinking that led to a message's content."""


@dataclass(frozen=True)
class Turn:
    """Characters `[start, end)` of the text that the model produces in one assistant turn.

    `trained` is False for a turn that the template does not render as it was generated, because
    it strips the thinking from earlier turns: such a turn is context only.
    """

    start: int
    end: int
    trained: bool = True


def find_turns(
    messages: Sequence[Message],
    indices: Sequence[int],
    render: Render,
    end_tokens: tuple[str, ...],
) -> tuple[str, list[Turn]]:
    """Return the text of the conversation and where in it the messages at `indices` are.

    Of an assistant's message that is what the model must produce, of another its content and the
    token behind that. `end_tokens` are the texts of the tokens that may close a turn, which then
    ends right behind that token. Raises UserError if the template renders the conversation in a
    way that leaves the turns ambiguous.
    """
    text = render(messages, False)
    turns = []
    for k in indices:
        locate = _locate if messages[k]["role"] == "assistant" else _locate_content
        turns.append(locate(messages, k, text, render, end_tokens))
    return text, turns


def part_borders(
    messages: Sequence[Message], k: int, text: str, turn: Turn, count: int, render: Render
) -> list[int]:
    """Return where in `text` all but the first of the `count` parts of assistant message k begin:
    its text, unless it consists of calls alone, and its tool calls.

    A call begins where the message with it differs from the message without it.
    """
    message = messages[k]
    calls, so_far = message["tool_calls"], render(messages[: k + 1], False)
    if not text.startswith(so_far):
        raise _ambiguous(messages, k, "is not rendered as it would be generated")
    borders = []
    for before in range(len(calls) - count + 1, len(calls)):
        fewer = {key: value for key, value in message.items() if key != "tool_calls"}
        if before:
            fewer["tool_calls"] = calls[:before]
        without = render([*messages[:k], fewer], False)
        pairs = zip(so_far, without, strict=False)
        border = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        while border > turn.start and text[border - 1] in "<[":  # of markup in both
            border -= 1
        borders.append(max(border, turn.start))
    return borders


def _locate(
    messages: Sequence[Message], k: int, text: str, render: Render, end_tokens: tuple[str, ...]
) -> Turn:
    if k == 0:  # no messages before it that could be rendered with a generation prompt
        prompt = _surroundings(messages[:1], 0, render)[0]
    else:
        prompt = render(messages[:k], True)
    so_far = render(messages[: k + 1], False)
    if text.startswith(prompt) and text.startswith(so_far) and len(prompt) <= len(so_far):
        return Turn(len(prompt), _closed(text, len(prompt), len(so_far), end_tokens))
    if k == len(messages) - 1:
        raise _ambiguous(messages, k, "does not begin with the template's generation prompt")
    return _rewritten_turn(messages, k, text, prompt, render, end_tokens)


def _rewritten_turn(
    messages: Sequence[Message],
    k: int,
    text: str,
    prompt: str,
    render: Render,
    end_tokens: tuple[str, ...],
) -> Turn:
    """Locate an earlier turn that is rendered unlike a last turn, as thinking templates do."""
    start, end = _content(messages, k, text, render)
    shown, content = text[start:end].strip(), messages[k]["content"].strip()
    if shown == content and REASONING & messages[k].keys():
        return Turn(start, end, trained=False)
    if shown == content and text.startswith(prompt) and len(prompt) <= start:
        return Turn(len(prompt), _end_after(messages, k, text, end, render, end_tokens))
    if _THINK_END in content and shown == content.rpartition(_THINK_END)[2].strip():
        return Turn(start, end, trained=False)
    context = render(messages[:k], False) if k else ""
    if shown == content and text.startswith(context) and "<think>" in prompt[len(context) :]:
        return Turn(start, end, trained=False)
    raise _ambiguous(messages, k, "is not rendered as it would be generated")


def _locate_content(
    messages: Sequence[Message], k: int, text: str, render: Render, end_tokens: tuple[str, ...]
) -> Turn:
    start, end = _content(messages, k, text, render)
    return Turn(start, _end_after(messages, k, text, end, render, end_tokens))


def _content(messages: Sequence[Message], k: int, text: str, render: Render) -> tuple[int, int]:
    """Return where the content of message k is in the text of the conversation."""
    before, after = _surroundings(messages, k, render)
    start, end = len(before), len(text) - len(after)
    if not (text.startswith(before) and text.endswith(after) and start <= end):
        raise _ambiguous(messages, k, "changes the text of other turns")
    return start, end


def _surroundings(messages: Sequence[Message], k: int, render: Render) -> tuple[str, str]:
    """Return the text before and after the content of message k."""
    probed = [*messages[:k], {**messages[k], "content": _PROBE}, *messages[k + 1 :]]
    parts = render(probed, False).split(_PROBE)
    if len(parts) != 2:
        raise _ambiguous(messages, k, f"shows its content {len(parts) - 1} times")
    return parts[0], parts[1]


def _closed(text: str, start: int, end: int, end_tokens: tuple[str, ...]) -> int:
    """Return where the turn `[start, end)` ends with the token that closes it.

    White space behind that token is left out. Where the template does not close turns, the token
    that opens the next one takes its place: producing it is how such a model stops.
    """
    turn = text[start:end].rstrip()
    if turn.endswith(end_tokens):
        return start + len(turn)
    opening = next((token for token in end_tokens if text.startswith(token, end)), "")
    return end + len(opening)


def _end_after(
    messages: Sequence[Message],
    k: int,
    text: str,
    end: int,
    render: Render,
    end_tokens: tuple[str, ...],
) -> int:
    """Return where turn k ends, given that its content ends at `end`."""
    tail = _surroundings(messages[: k + 1], k, render)[1]
    if text.startswith(tail, end):
        return _closed(text, end, end + len(tail), end_tokens)
    for token in end_tokens:  # some templates close the last turn with another token
        if text.startswith(token, end):
            return end + len(token)
    raise _ambiguous(messages, k, "is closed neither as a last turn nor by an added token")


def _ambiguous(messages: Sequence[Message], k: int, why: str) -> UserError:
    return UserError(
        f"chat template: message {k + 1} ({messages[k]['role']}) {why}, so the "
        "tokens to train cannot be told apart: use --loss_scale last_round if only earlier turns "
        "are concerned, or choose another template with --template"
    )
