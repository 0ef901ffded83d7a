"""The process group of a job, made before Megatron asks for it."""

import os
import socket
import sys
import threading
from datetime import timedelta
from typing import Any

import torch

from swiftmeg import platform
from swiftmeg.errors import UserError

NOTICE = 10
"""Seconds between two lines of a process that waits for the others."""

PATIENCE = 900
"""Seconds that it waits."""


def initialize(timeout_minutes: int = 60) -> None:
    """Join the job that the launcher's environment describes, or be a job of one process.

    No `device_id`: with it NCCL would make every communicator at once, and those of Megatron's two
    dozen groups, most of which never communicate, take 8 GiB of a GPU.
    """
    if torch.distributed.is_initialized():
        return
    if os.environ.get("WORLD_SIZE", "1") == "1" and "MASTER_ADDR" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=port)
    if platform.has_cuda():
        torch.cuda.set_device(platform.device())
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world = _meet()
    store.set_timeout(timeout)
    torch.distributed.init_process_group(
        backend=platform.backend(),
        store=torch.distributed.PrefixStore("default_pg", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )


def _meet() -> tuple[Any, int, int]:
    """Meet the job's other processes: their store, this one's rank, how many there are.

    Says every NOTICE seconds whom it waits for; UserError after PATIENCE seconds.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    last = f"rank {world - 1}" if world == 2 else f"ranks 1 to {world - 1}"
    whom = f"{last if rank == 0 else 'rank 0'} at {place}"
    met = threading.Event()

    def notice() -> None:
        waited = 0
        while not met.wait(NOTICE):
            waited += NOTICE
            print(f"rank {rank} waits for {whom} ({waited} s)", file=sys.stderr, flush=True)

    threading.Thread(target=notice, daemon=True).start()
    try:
        patience = timedelta(seconds=PATIENCE)
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=patience))
        return store, rank, world
    except (torch.distributed.DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {rank} has not met {whom}: {reason}") from None
    finally:
        met.set()


def on_rank_zero() -> bool:
    """True on the job's first process."""
    return torch.distributed.get_rank() == 0


def barrier() -> None:
    """Wait for every process of the job."""
    device_ids = [platform.device().index] if platform.has_cuda() else None
    torch.distributed.barrier(device_ids=device_ids)


def gathered[T](value: T) -> list[T]:
    """The values that all processes have, in the order of ranks; collective."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_rank_zero[T](value: T) -> T:
    """The first process's value, on every process; collective."""
    values: list[Any] = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=platform.device())
    return values[0]


def shut_down() -> None:
    """Leave the job, if this process is in one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
