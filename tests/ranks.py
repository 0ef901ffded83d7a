"""Run a function on N ranks of a gloo job, forked from a server that has imported Megatron."""

import contextlib
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

PRELOAD = [
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "megatron.training",
    "datasets",
    "tests.preload",
]


def fork_context() -> Any:
    """The server that forks processes, with what takes long to import already there.

    With a GPU every process starts afresh: the imports touch CUDA, which does not survive a fork.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def rank_main(
    pipe: Connection, rank: int, world: int, port: int, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        MASTER_PORT=str(port),
    )
    try:
        from swiftmeg import distributed, platform

        platform.prepare()
        distributed.initialize(timeout_minutes=3)
        pipe.send((function(*args), None))
    except BaseException:
        pipe.send((None, f"rank {rank}:\n{traceback.format_exc()}"))
    finally:
        pipe.close()
    # Gloo's and Megatron's threads have nothing left to say.
    os._exit(0)


def free_port() -> int:
    """A port below those that the system hands out: nobody gets it before rank 0 does."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 240
) -> list[Any]:
    """Return every rank's `function(*args)`, which must pickle; raises the first failure."""
    context = fork_context()
    port = free_port()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=rank_main, args=(theirs, rank, world, port, function, args), daemon=False
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: dict[int, Any] = {}
    try:
        while len(results) < world:
            pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(pending, timeout=timeout)
            if not ready:
                raise TimeoutError(f"ranks {set(range(world)) - set(results)} say nothing")
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    result, error = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise RuntimeError(f"rank {rank} died without a word") from None
                if error:
                    raise RuntimeError(error)
                results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=5 if len(results) == world else 0)
            process.kill()
    return [results[rank] for rank in range(world)]
