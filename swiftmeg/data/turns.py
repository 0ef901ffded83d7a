"""Where the assistant's turns lie in a rendered conversation.

Templates say nothing about which text is the assistant's. It is found by rendering prefixes of
the conversation: what the template adds after `messages[:k]` plus the generation prompt, up to
`messages[:k+1]`, is what the model must produce in turn k. Where a prefix of the conversation is
not rendered as a prefix of the text, the place would be a guess, and the conversation is refused.
"""

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


@dataclass(frozen=True)
class Turn:
    """Characters `[start, end)` of the text that the model produces in one assistant turn.

    `trained` is False for a turn that the template does not render as it was generated, because
    it strips the thinking from earlier turns: such a turn is context only.
    """

    start: int
    end: int
    trained: bool = True


def assistant_turns(
    messages: Sequence[Message],
    render: Render,
    end_tokens: tuple[str, ...],
    last_only: bool = False,
) -> tuple[str, list[Turn]]:
    """Return the text of the conversation and its assistant turns in order.

    `end_tokens` are the texts of the tokens that may close a turn, which then ends right behind
    that token. Raises UserError if the template renders the conversation in a way that leaves the
    turns ambiguous.
    """
    text = render(messages, False)
    indices = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if last_only:
        indices = indices[-1:]
    return text, [_locate(messages, k, text, render, end_tokens) for k in indices]


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
        raise _ambiguous(k, "does not begin with the template's generation prompt")
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
    before, after = _surroundings(messages, k, render)
    start, end = len(before), len(text) - len(after)
    if not (text.startswith(before) and text.endswith(after) and start <= end):
        raise _ambiguous(k, "changes the text of other turns")
    shown, content = text[start:end].strip(), messages[k]["content"].strip()
    if shown == content and text.startswith(prompt) and len(prompt) <= start:
        return Turn(len(prompt), _end_after(messages, k, text, end, render, end_tokens))
    if _THINK_END in content and shown == content.rpartition(_THINK_END)[2].strip():
        return Turn(start, end, trained=False)
    context = render(messages[:k], False) if k else ""
    if shown == content and text.startswith(context) and "<think>" in prompt[len(context) :]:
        return Turn(start, end, trained=False)
    raise _ambiguous(k, "is not rendered as it would be generated")


def _surroundings(messages: Sequence[Message], k: int, render: Render) -> tuple[str, str]:
    """Return the text before and after the content of message k."""
    probed = [*messages[:k], {**messages[k], "content": _PROBE}, *messages[k + 1 :]]
    parts = render(probed, False).split(_PROBE)
    if len(parts) != 2:
        raise _ambiguous(k, f"shows its content {len(parts) - 1} times")
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
    raise _ambiguous(k, "is closed neither as a last turn nor by an added token")


def _ambiguous(k: int, why: str) -> UserError:
    return UserError(
        f"chat template: message {k + 1} (assistant) {why}, so the tokens to train cannot be told "
        "apart: use --loss_scale last_round if only earlier turns are concerned, or choose "
        "another template with --template"
    )
