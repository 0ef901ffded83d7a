"""torchrun from the environment: one process per rank on this node, and how they end together.

NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT mean what they mean to torchrun,
whose agent does the work. What is added: the first failure of the job is shown once and last,
ranks that are stuck in a collective are killed after seconds, and nothing outlives the launcher.
"""

import contextlib
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftmeg.claim import CLAIMS, remove_unused
from swiftmeg.cli.failure import LAUNCHER_PID, show
from swiftmeg.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

GRACE_AFTER_FAILURE = 5
"""Seconds between SIGTERM and SIGKILL for the other ranks when one has failed."""

GRACE_AFTER_SIGNAL = 600
"""Seconds between the signal that the launcher received and SIGKILL: time to save a checkpoint.

Ranks end at once unless --exit_signal_handler makes them finish the step and save."""

POLL_INTERVAL = 0.1
"""Seconds between two looks at the ranks."""


@dataclass(frozen=True)
class Topology:
    """The ranks of a job: how many, which of them are here, and where rank 0 listens."""

    nproc_per_node: int
    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int


def requested(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for several processes and this is not one of them already.

    LOCAL_RANK marks a process that torchrun, srun or mpirun started. RANK does not: some clusters
    set RANK and WORLD_SIZE for a node.
    """
    asked = "NPROC_PER_NODE" in environ or "NNODES" in environ
    return asked and "LOCAL_RANK" not in environ


def job_size(environ: Mapping[str, str]) -> int:
    """How many processes the environment asks for; UserError for a value that is no number."""
    if "NPROC_PER_NODE" not in environ and "NNODES" not in environ:
        return _number(environ, "WORLD_SIZE", 1, minimum=1)
    nproc = _number(environ, "NPROC_PER_NODE", 1, minimum=1)
    return nproc * _number(environ, "NNODES", 1, minimum=1)


def topology(environ: Mapping[str, str]) -> Topology:
    """Read the job's shape from the environment.

    Raises UserError for a value that is no number or out of range, for several nodes without
    MASTER_ADDR or NODE_RANK, and on the first node when MASTER_PORT is in use.
    """
    nproc = _number(environ, "NPROC_PER_NODE", 1, minimum=1)
    nnodes = _number(environ, "NNODES", 1, minimum=1)
    node_rank = _number(environ, "NODE_RANK", 0, minimum=0)
    if node_rank >= nnodes:
        raise UserError(f"NODE_RANK={node_rank} must be below NNODES={nnodes}")
    if nnodes > 1:
        for name in ("MASTER_ADDR", "NODE_RANK"):
            if name not in environ:
                raise UserError(f"NNODES={nnodes} needs {name} to be set on every node")
    address = environ.get("MASTER_ADDR", "127.0.0.1")
    if nnodes == 1 and "MASTER_PORT" not in environ:
        return Topology(nproc, nnodes, node_rank, address, _free_port())
    port = _number(environ, "MASTER_PORT", 29500, minimum=1)
    if node_rank == 0:
        _check_port(port)
    return Topology(nproc, nnodes, node_rank, address, port)


def launch(worker: Sequence[str]) -> int:
    """Run `python *worker` once per local rank until all end; return the job's exit code.

    `worker` is a module or script with its arguments, whose own code runs inside
    `swiftmeg.cli.failure.guarded`. 0: all ranks succeeded. 128 + n: the launcher or a rank was
    ended by signal n. Otherwise the code of the rank that failed first, whose message or traceback
    is the last thing printed. Raises UserError when the environment describes no possible job.
    """
    job = topology(os.environ)
    print(f"run sh: `{_torchrun_line(job, worker)}`", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # torchrun's default of one thread would leave most of a CPU node idle.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // job.nproc_per_node)))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    return _run(job, worker)


def _run(job: Topology, worker: Sequence[str]) -> int:
    import torch
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    class Agent(LocalElasticAgent):
        """torchrun's agent, which also remembers which ranks ended before it ended the rest."""

        first_deaths: dict[int, float] | None = None  # rank -> seconds since the epoch

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            ids: dict[int, Any] = super()._start_workers(worker_group)
            self._ranks = {w.local_rank: w.global_rank for w in worker_group.workers}
            context: Any = self._pcontext
            context.close = partial(self._close, context, context.close)
            return ids

        def _close(self, context: Any, close: Any, death_sig: Any = None) -> None:
            processes = {i: h.proc for i, h in context.subprocess_handlers.items()}
            if self.first_deaths is None:
                self.first_deaths = {
                    self._ranks[i]: time.time() for i, p in processes.items() if p.poll()
                }
            close(death_sig, GRACE_AFTER_SIGNAL if death_sig else GRACE_AFTER_FAILURE)
            # Each rank leads a process group; its data workers may still be there.
            for process in processes.values():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    gpus = torch.cuda.device_count()
    if gpus and job.nproc_per_node > gpus:
        raise UserError(
            f"NPROC_PER_NODE={job.nproc_per_node}, but this node has {gpus} visible GPU(s):"
            " lower it or see CUDA_VISIBLE_DEVICES"
        )
    quiet = logging.getLogger("torch.distributed.elastic")  # its account of a failure repeats ours
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    rendezvous = RendezvousParameters(
        backend="static",
        endpoint=f"{job.master_addr}:{job.master_port}",
        run_id="swiftmeg",
        min_nodes=job.nnodes,
        max_nodes=job.nnodes,
        rank=job.node_rank,
        timeout=900,
    )
    # Waiting for the first node happens in C++, where Python's Ctrl-C would not arrive. No rank
    # exists yet, so to die is enough; the agent installs its own handlers with the ranks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with tempfile.TemporaryDirectory(prefix="swiftmeg_ranks_") as records, _claims(records):
        agent = Agent(
            WorkerSpec(
                role="default",
                local_world_size=job.nproc_per_node,
                entrypoint=sys.executable,
                args=("-u", *worker),
                rdzv_handler=get_rendezvous_handler(rendezvous),
                max_restarts=0,
                monitor_interval=POLL_INTERVAL,
                master_addr=job.master_addr,
                master_port=job.master_port,
            ),
            logs_specs=DefaultLogsSpecs(log_dir=records),
        )
        try:
            result = agent.run()
        except SignalException as ended:
            return 128 + ended.sigval
        except torch.distributed.DistError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot meet the other nodes at MASTER_ADDR={job.master_addr}"
                f" MASTER_PORT={job.master_port}: {reason}"
            ) from None
    if not result.failures:
        return 0
    return _show_first_failure(result.failures, agent.first_deaths or {})


@contextlib.contextmanager
def _claims(records: str) -> Iterator[None]:
    """Let ranks say what folders they make, and remove those that they leave empty."""
    claims = Path(records) / "claims"
    os.environ[CLAIMS] = str(claims)
    try:
        yield
    finally:
        listed = claims.read_text().splitlines() if claims.is_file() else []
        remove_unused([Path(line) for line in listed])


def _show_first_failure(
    failures: "Mapping[int, ProcessFailure]", deaths: Mapping[int, float]
) -> int:
    """Print what the rank that failed first has to say; return its exit code.

    `failures` includes the ranks that the agent ended; `deaths` only those that ended before it,
    by global rank, with the time (s) at which that was seen.
    """

    def moment(rank: int) -> float:
        recorded = _record(failures[rank]).get("extraInfo", {}).get("timestamp")
        if recorded is not None:
            return float(recorded)
        # Killed: seen up to a poll late, and its peers report a lost connection within
        # milliseconds. It was first nevertheless.
        return deaths[rank] - 2 * POLL_INTERVAL

    candidates = [r for r in failures if r in deaths or _record(failures[r])]
    rank = min(candidates or failures, key=moment if candidates else int)
    failure = failures[rank]
    if record := _record(failure):
        show(record["message"], record["user_error"], rank)
    elif failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = ": is the machine out of memory?" if name == "SIGKILL" else ""
        show(f"rank {rank} (pid {failure.pid}) was killed by {name}{hint}", is_user_error=True)
    else:
        code = failure.exitcode
        show(f"rank {rank} (pid {failure.pid}) exited with code {code}", is_user_error=True)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _record(failure: "ProcessFailure") -> dict[str, Any]:
    """Return what `swiftmeg.cli.failure` recorded in that rank; empty if it could not."""
    message = failure.error_file_data.get("message")
    return message if isinstance(message, dict) else {}


def _torchrun_line(job: Topology, worker: Sequence[str]) -> str:
    """The command that starts the same ranks by hand."""
    flags = ["--nproc_per_node", str(job.nproc_per_node)]
    if job.nnodes > 1:
        flags += ["--nnodes", str(job.nnodes), "--node_rank", str(job.node_rank)]
    flags += ["--master_addr", job.master_addr, "--master_port", str(job.master_port)]
    return shlex.join([sys.executable, "-m", "torch.distributed.run", *flags, *worker])


def _number(environ: Mapping[str, str], name: str, default: int, minimum: int) -> int:
    text = environ.get(name, str(default))
    if not text.strip().isdecimal() or int(text) < minimum:
        raise UserError(f"{name}={text!r} must be a whole number, at least {minimum}")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _check_port(port: int) -> None:
    if port > 65535:
        raise UserError(f"MASTER_PORT={port} is no port: the highest is 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"MASTER_PORT={port} cannot be used ({error.strerror}):"
                " choose another, or unset it to have a free one chosen"
            ) from None
