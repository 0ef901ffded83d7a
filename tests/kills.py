"""Jobs of which a process is killed at a determined place: inside a file that it writes.

The kernel kills: the process may write so many bytes of one file, and SIGXFSZ ends it in the middle
of what is one more.
"""

import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from tests.ranks import fork_context, free_port, rank_main
from tests.runs import command


def die_inside(pattern: str, size: int) -> None:
    """End this process when it writes more than `size` bytes of a file, named by an expression."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_inside(pattern, size)


def limit_inside(pattern: str, size: int) -> None:
    """Let no file become larger once one is opened whose name matches: writing more is an error."""
    writing = os.O_WRONLY | os.O_RDWR

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] & writing and re.search(pattern, str(args[0])):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    sys.addaudithook(hook)


def work_and_die(pattern: str, size: int, name: str, argv: list[str]) -> None:
    """Run a command that ends when it writes more than `size` bytes of such a file."""
    die_inside(pattern, size)
    command(name, argv)


def exit_codes(world: int, function: Callable[..., None], *args: Any) -> list[int | None]:
    """How the ranks of a job end, of which some are killed; None for one that does not."""
    context = fork_context()
    port = free_port()
    ranks = []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=rank_main, args=(theirs, rank, world, port, function, args)
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    codes = []
    for process, _ in ranks:
        process.join(timeout=60)
        codes.append(process.exitcode)
        process.kill()
    return codes
