"""The one exception that users are meant to see."""


class UserError(Exception):
    """Bad input: its message is the single line shown to the user, without a traceback.

    The message names the flag, file or tensor, what was found, what is accepted and what to do.
    """
