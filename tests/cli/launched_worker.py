"""One rank of the jobs in test_launch.py: does what the scenario named first in argv says."""

import os
import signal
import sys
import time
from pathlib import Path

from swiftmeg.cli.failure import guarded
from swiftmeg.errors import UserError

RANK = int(os.environ["RANK"])


def _barrier() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if RANK == 0:
        dist.barrier()  # where the others never arrive


def succeed() -> None:
    print(f"rank {RANK} threads {os.environ['OMP_NUM_THREADS']}")


def user_error() -> None:
    raise UserError("--lr 0 must be\nabove zero")


def traceback_of_rank_1() -> None:
    _barrier()
    if RANK == 1:
        raise RuntimeError("boom on one")
    time.sleep(60)


def killed() -> None:
    _barrier()
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def exit_code() -> None:
    if RANK == 1:
        sys.exit(7)
    time.sleep(60)


def stubborn() -> None:
    """Rank 0 does not end when asked to, and has a child."""
    if RANK == 1:
        time.sleep(1)
        raise UserError("one is enough")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(60)


def wait() -> None:
    """Announce this process, then block in a collective."""
    Path(sys.argv[2], str(os.getpid())).touch()
    _barrier()
    time.sleep(60)


if __name__ == "__main__":
    sys.exit(guarded(globals()[sys.argv[1]]))
