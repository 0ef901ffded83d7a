"""Runs that start together write to folders of their own."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from swiftmeg import claim
from swiftmeg.errors import UserError


def _claim_at(moment: float, root: Path, pipe: Connection) -> None:
    time.sleep(max(0.0, moment - time.time()))
    pipe.send([claim.claim_version(root) for _ in range(5)])


def _lock_and_wait(folder: Path, pipe: Connection) -> None:
    claim.lock(folder)
    pipe.send(os.getpid())
    time.sleep(60)


def start(function: Any, *args: Any) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*args, theirs))
    process.start()
    return process, ours


def test_runs_that_start_together_have_folders_of_their_own(tmp_path: Path) -> None:
    moment = time.time() + 0.3
    started = [start(_claim_at, moment, tmp_path / "a" / "b") for _ in range(6)]
    folders = [folder for _, pipe in started for folder in pipe.recv()]
    for process, _ in started:
        process.join()
    assert len(folders) == len(set(folders)) == 30
    assert all(re.fullmatch(r"v\d+-\d{8}-\d{6}", each.name) and each.is_dir() for each in folders)


def test_a_folder_in_use_is_refused_by_process_and_host(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process, pipe = start(_lock_and_wait, folder)
    try:
        holder = pipe.recv()
        with pytest.raises(UserError, match=f"process {holder} on {socket.gethostname()} is writ"):
            claim.lock(folder)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    claim.lock(folder)  # the dead have no locks
    claim.release(folder)
    assert list(folder.iterdir()) == []


def test_what_a_failed_run_has_made_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_made", [])
    claim.claim_version(tmp_path / "a" / "b")
    used = claim.claim_version(tmp_path / "c")
    (used / "args.json").touch()
    claim.lock(tmp_path / "d" / "e")
    claim.discard_unused()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert (used / "args.json").is_file()
    with contextlib.suppress(KeyError):
        claim._held.pop(tmp_path / "d" / "e").close()
