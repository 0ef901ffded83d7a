"""Jobs of two or three tiny ranks: what they print, when they end and what they leave behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from swiftmeg.cli import launch
from swiftmeg.errors import UserError

WORKER = str(Path(__file__).with_name("launched_worker.py"))
LAUNCHER = """
import sys
from swiftmeg.cli import failure, launch
sys.exit(failure.guarded(lambda: launch.launch(sys.argv[1:])))
"""


def _environment(**changes: str) -> dict[str, str]:
    ours = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    theirs = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    kept = {k: v for k, v in os.environ.items() if k not in ours + theirs}
    return kept | {"NPROC_PER_NODE": "2"} | changes


def _start(*words: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER, *words],
        env=_environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _finish(*words: str, **changes: str) -> tuple[int, str, str, float]:
    started = time.monotonic()
    job = _start(*words, **changes)
    out, err = job.communicate(timeout=60)
    return job.returncode, out, err, time.monotonic() - started


def test_every_rank_runs_and_the_command_is_shown_first():
    code, out, err, _ = _finish("succeed", NPROC_PER_NODE="3")
    assert code == 0, err
    assert re.match(r"run sh: `.*torch\.distributed\.run --nproc_per_node 3 .*succeed`\n", out)
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    ranks = [f"rank {rank} threads {threads}" for rank in range(3)]
    assert sorted(out.splitlines()[1:]) == ranks
    assert err == ""


def test_user_error_of_all_ranks_is_one_line():
    code, _, err, _ = _finish("user_error")
    assert code == 1
    assert err == "error: --lr 0 must be above zero\n"


def test_traceback_of_the_first_failing_rank_comes_last_and_alone():
    code, _, err, seconds = _finish("traceback_of_rank_1")
    assert code == 1
    assert seconds < 15
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1] == "[rank1] RuntimeError: boom on one"


def test_killed_rank_is_named_rather_than_its_stranded_peers():
    code, _, err, seconds = _finish("killed")
    assert code == 128 + signal.SIGKILL
    assert seconds < 15
    assert re.fullmatch(r"error: rank 1 \(pid \d+\) was killed by SIGKILL.*\n", err), err


def test_exit_code_of_a_rank_is_the_job_s():
    code, _, err, _ = _finish("exit_code")
    assert code == 7
    assert re.fullmatch(r"error: rank 1 \(pid \d+\) exited with code 7\n", err)


def test_rank_that_ignores_sigterm_and_its_child_are_killed():
    code, _, err, seconds = _finish("stubborn")
    assert (code, err) == (1, "error: one is enough\n")
    assert launch.GRACE_AFTER_FAILURE < seconds < 15
    assert not _alive("launched_worker.py")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_to_the_launcher_ends_every_rank_silently(sent: signal.Signals, tmp_path: Path):
    job = _start("wait", str(tmp_path))
    _until(lambda: len(list(tmp_path.iterdir())) == 2)
    time.sleep(0.5)
    job.send_signal(sent)
    _, err = job.communicate(timeout=10)
    expected = -sent if sent == signal.SIGKILL else 128 + sent
    assert (job.returncode, err) == (expected, "")
    _until(lambda: not any(psutil.pid_exists(int(pid.name)) for pid in tmp_path.iterdir()))


def test_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err, seconds = _finish("succeed", MASTER_PORT=str(port))
    assert code == 1
    assert seconds < 5
    assert err.startswith(f"error: MASTER_PORT={port} cannot be used (Address already in use)")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE='two' must be a whole number, at least 1"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE='0' must be a whole number, at least 1"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "here"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 must be below NNODES=2"),
        ({"NNODES": "1:2"}, "NNODES='1:2' must be a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_impossible_jobs_are_refused(environ: dict[str, str], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        launch.topology(environ)


def test_two_nodes_make_one_job():
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    both = {"NPROC_PER_NODE": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [_start("succeed", NODE_RANK=str(rank), **both) for rank in range(2)]
    outputs = [node.communicate(timeout=60) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    for rank, (out, _) in enumerate(outputs):
        assert f"--nnodes 2 --node_rank {rank}" in out
        assert f"\nrank {rank} threads" in out


def test_requested_only_outside_of_a_rank():
    assert not launch.requested({})
    assert launch.requested({"NPROC_PER_NODE": "1"})
    assert launch.requested({"NNODES": "2", "RANK": "1", "WORLD_SIZE": "2"})  # a cluster's node
    assert not launch.requested({"NPROC_PER_NODE": "2", "RANK": "0", "LOCAL_RANK": "0"})


def _alive(word: str) -> list[int]:
    mine = psutil.Process().uids().real
    return [
        p.pid
        for p in psutil.process_iter(["cmdline", "uids", "status"])
        if p.info["uids"].real == mine
        and p.info["status"] != psutil.STATUS_ZOMBIE
        and any(word in w for w in p.info["cmdline"] or [])
        and p.pid != os.getpid()
        and "pytest" not in " ".join(p.info["cmdline"])
    ]


def _until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still not so"
        time.sleep(0.05)
