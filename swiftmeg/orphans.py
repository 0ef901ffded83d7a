"""Processes that end with the one that started them."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that the kernel sends when the parent dies."""


def die_with(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent dies; on Linux only.

    `parent` is the id that the parent had: where it died before this call, this process ends here.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
