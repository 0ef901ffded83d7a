"""What the template's flags may be, and what they and the tokenizer say."""

from pathlib import Path
from typing import Any

from swiftmeg.data.template.chat_renderer import ChatRenderer
from swiftmeg.errors import UserError


def check_choice(flag: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raise UserError for a value that is not accepted."""
    if value not in accepted:
        raise UserError(f"{flag} {value}: unknown; accepted: {', '.join(accepted)}")


def check_agent_template(name: str | None, renderer: ChatRenderer | None) -> None:
    """Raise UserError unless tools are written as `name` says, or nothing is said."""
    if name is None:
        return
    if name != "hermes":
        raise UserError(
            f"--agent_template {name}: tools are written as the chat template says: drop it"
        )
    if renderer is None or "<tool_call>" not in renderer.tools_jinja:
        raise UserError(
            "--agent_template hermes: the chat template writes no <tool_call>: drop it, or choose "
            "--template chatml, qwen or qwen2_5"
        )


def end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the tokens that may close a turn: special ones and other markers.

    `</think>`, `</tool_call>` and their like are added tokens too, but close a part of a turn.
    """
    texts = {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}
    special = {
        *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
        *tokenizer.all_special_tokens,
    }
    return tuple(
        sorted(
            text
            for text in texts
            if text.strip() and (text in special or not text.startswith("</"))
        )
    )


def read_system(system: str | None) -> str | None:
    """Return the text of a system prompt, which may stand in a .txt file."""
    if system is None:
        return None
    if system.endswith(".txt"):
        try:
            return Path(system).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"--system {system}: cannot be read ({error.strerror})") from None
    return system.replace("\\n", "\n")
