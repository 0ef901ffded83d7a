"""How a command ends: its exit code, the line or traceback shown, a rank's record of its error.

A rank started by `swiftmeg.cli.launch` prints nothing when it fails. It writes what went wrong
where torchelastic told it to and leaves at once, so that the launcher can show the first failure
of the job, once and last.
"""

import contextlib
import errno
import faulthandler
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from swiftmeg.claim import discard_unused
from swiftmeg.errors import UserError
from swiftmeg.orphans import die_with

LAUNCHER_PID = "SWIFTMEG_LAUNCHER_PID"
"""Environment variable that tells a rank which process launched it."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a file cannot grow."""


def guarded(action: Callable[[], int | None]) -> int:
    """Run `action`; return the process's exit code after showing or recording its failure.

    UserError: its message on one line and its code, which is 1, or 3 for a run that diverged. Any
    other exception: the traceback, code 1.
    Ctrl-C: 130. A reader that closed our standard output (`| head`): 141, silently.
    In a rank that the launcher started, a failure ends the process here and now.
    """
    launched = LAUNCHER_PID in os.environ
    if launched:
        _behave_as_rank(int(os.environ[LAUNCHER_PID]))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal or pipe has all characters
            stream.reconfigure(errors="replace")
    failure: UserError | None
    text = ""
    try:
        code = action() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as error:
        if not isinstance(error.code, str):
            return error.code or 0
        failure = UserError(error.code)
    except BaseException as error:
        if _stdout_is_closed():
            return 128 + signal.SIGPIPE
        failure = _as_user_error(error)
        text = traceback.format_exc()
    finally:
        discard_unused()
    is_user_error = failure is not None
    code = failure.exit_code if failure is not None else 1
    if launched:
        _record_and_leave(str(failure or text), is_user_error, code)
    show(str(failure or text), is_user_error)
    return code


def _as_user_error(error: BaseException) -> UserError | None:
    """What a user can do something about in an exception; None for a fault of the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        return UserError(
            f"{where}{os.strerror(error.errno)}: make room and start again: what was complete "
            "before is whole, and what was being written does not count"
        )
    # torch's readers and writers of checkpoints gather what failed on each rank.
    causes = [cause for cause, _ in getattr(error, "failures", {}).values()]
    return next((found for cause in causes if (found := _as_user_error(cause))), None)


def show(text: str, is_user_error: bool, rank: int | None = None) -> None:
    """Print a failure on stderr: one `error:` line, or a traceback whose lines name `rank`."""
    sys.stdout.flush()
    if is_user_error:
        lines = ["error: " + " ".join(text.split())]
    else:
        prefix = "" if rank is None else f"[rank{rank}] "
        lines = [prefix + line for line in text.rstrip().splitlines()]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _behave_as_rank(launcher: int) -> None:
    """Make this process end when its launcher says so, or dies."""
    # A rank blocked inside a collective never returns to the interpreter, so Python's own handler
    # could not run there. The default action ends it at once, and leaves no traceback of Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.enable()
    die_with(launcher)


def _record_and_leave(text: str, is_user_error: bool, code: int) -> NoReturn:
    """Write torchelastic's error file, then end without any teardown.

    Leaving a process group that lost a member can block for minutes, hence `os._exit`.
    """
    record = {
        "message": {
            "message": text,
            "extraInfo": {"timestamp": time.time(), "py_callstack": text},
            "user_error": is_user_error,
        }
    }
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record))
    part.replace(path)  # the launcher never sees half a record
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _stdout_is_closed() -> bool:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit; give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
