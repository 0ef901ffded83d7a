"""The one exception that users are meant to see, and how its messages show flags."""


class UserError(Exception):
    """Bad input: its message is the single line shown to the user, without a traceback.

    The message names the flag, file or tensor, what was found, what is accepted and what to do.
    """

    exit_code = 1


class Diverged(UserError):
    """Training has left the numbers: what it would go on with is lost, what it saved is not."""

    exit_code = 3


def typed(value: object) -> str:
    """A flag's value as a user types it: `true` for True, words for a list."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(typed, value)) if isinstance(value, list) else str(value)
