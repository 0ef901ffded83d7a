"""Commands that end badly, run in forks of a process that has imported Megatron."""

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import fork_context

SECONDS = 2 * 15 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
"""How long a failing command may take: 15 on an idle machine of some speed."""


def words(program: str, flags: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    """A command line; a change to None leaves the flag out, a list gives it several values."""
    line = program.split()
    for name, value in (flags | changes).items():
        if value is not None:
            line += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return line


def sft(**changes: Any) -> list[str]:
    flags = {
        "model": "llama",
        "dataset": "rows.jsonl",
        "train_iters": 2,
        "global_batch_size": 4,
        "num_workers": 0,
        "save": "out",
    }
    return words("megatron sft", flags, changes)


def export(**changes: Any) -> list[str]:
    return words("swift export", {"output_dir": "out"}, changes)


def to_mcore(**changes: Any) -> list[str]:
    return export(**({"model": "llama", "to_mcore": "true"} | changes))


def to_hf(**changes: Any) -> list[str]:
    return export(**({"model": "llama", "mcore_model": "ckpt", "to_hf": "true"} | changes))


@dataclass
class Case:
    """A command, run in the folder of `inputs`, and the line (a regular expression) it ends in."""

    name: str
    command: list[str]
    expected: str
    environ: dict[str, str] = field(default_factory=dict)
    late: bool = False
    """Needs Megatron to be found: the others must not get as far as starting it."""


def ranks(count: int) -> dict[str, str]:
    """The environment of rank 0 of a job; early checks need no more of it."""
    return {"WORLD_SIZE": str(count), "RANK": "0", "LOCAL_RANK": "0"}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


JOB_VARIABLES = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_forked(case: Case, folder: Path, scratch: Path) -> tuple[int, str]:
    """Run a command in a fork of a process that has imported everything; exit code and stderr."""
    ((code, text),) = run_together([case], folder, scratch)
    return code, text


def run_together(cases: list[Case], folder: Path, scratch: Path) -> list[tuple[int, str]]:
    """Run commands one after another in one fork; exit code and stderr of each.

    What case i prints to standard output is in `scratch`/i.out. None of several may start
    Megatron, which a process can do only once.
    """
    process = fork_context().Process(target=_forked_main, args=(cases, str(folder), str(scratch)))
    process.start()
    process.join(timeout=SECONDS + 2 * len(cases))
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"hangs after {[path.name for path in scratch.glob('*.code')]}")
    return [
        (int((scratch / f"{i}.code").read_text()), (scratch / f"{i}.err").read_text())
        for i in range(len(cases))
    ]


def _forked_main(cases: list[Case], folder: str, scratch: str) -> None:
    from swiftmeg import platform
    from swiftmeg.cli.main import run

    os.chdir(folder)
    for name in JOB_VARIABLES:
        os.environ.pop(name, None)
    os.environ["SWIFTMEG_CACHE"] = f"{scratch}/cache"
    environ, prepare = dict(os.environ), platform.prepare

    def started() -> None:
        raise AssertionError("Megatron was started")

    for index, case in enumerate(cases):
        os.environ.clear()
        os.environ.update(environ | case.environ)
        for number, kind in ((1, "out"), (2, "err")):
            file = os.open(f"{scratch}/{index}.{kind}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, number)
        platform.prepare = prepare if case.late else started
        code = run(case.command[0], case.command[1:])
        sys.stdout.flush()
        sys.stderr.flush()
        Path(scratch, f"{index}.code").write_text(str(code))
    os._exit(0)


def check_message(text: str, expected: str) -> None:
    lines = text.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, text
    assert lines[-1].startswith("error: "), text
    assert "Traceback" not in text
    assert re.search(expected, lines[-1]), lines[-1]
