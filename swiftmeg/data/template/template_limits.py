"""Limits on chat templates, which are programs of whoever made the tokenizer.

A template is tried first in a process of its own, which may use only so much time and memory: some
of what a template can ask for cannot be stopped from outside. Then each rendering has limited time.
"""

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jinja2

SECONDS = 10
"""CPU time of one rendering, and of all that are tried."""
MOST_MEMORY = 2**30
MOST_TEXT = 2**26
"""Characters of a conversation's text."""


class TookTooLong(BaseException):
    """A rendering is over its time; not an Exception, which templates' filters may swallow."""


def fault_of(render: Callable[[], int]) -> str | None:
    """Return what is wrong with a template, or None; `render` returns how much it has written.

    That a template refuses what it is given, by any other exception, is no fault.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        _try(render, write)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return f"takes more than {SECONDS} s" if killed else "crashes"
    return said or None


def _try(render: Callable[[], int], write: int) -> None:
    """Run in the child: write the fault into the pipe and end."""
    fault = ""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, used + MOST_MEMORY))
        if render() > MOST_TEXT:
            fault = f"writes more than {MOST_TEXT:,} characters"
    except jinja2.TemplateSyntaxError as error:
        fault = f"line {error.lineno}: {error.message}"
    except MemoryError:
        fault = f"needs more than {MOST_MEMORY // 2**30} GiB"
    except BaseException:
        fault = ""
    finally:
        os.write(write, fault[:500].encode("utf-8", "replace"))
        os._exit(0)


@contextmanager
def limited_time() -> Iterator[None]:
    """Raise TookTooLong in what takes more than SECONDS of this process's CPU time.

    Only a main thread, which all that tokenise are, can be interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise TookTooLong
