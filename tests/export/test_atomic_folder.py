"""A folder under its name is the old one or the new one, whole, whenever the writer is killed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swiftmeg.export import atomic_folder

WRITER = """
import sys
from pathlib import Path
from swiftmeg.export.atomic_folder import publish

work = Path(sys.argv[1])
for version in range(int(sys.argv[2]), 10**9):
    complete = work / f".model.{version}"
    complete.mkdir()
    for name in ("config.json", "args.json", *(f"model-{i}.safetensors" for i in range(12))):
        (complete / name).write_text(str(version))
    print(version, flush=True)
    publish(complete, work / "model")
"""


def versions(folder: Path) -> set[str]:
    return {entry.read_text() for entry in folder.iterdir() if entry.name != "notes.txt"}


def test_a_killed_writer_leaves_no_mixture(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    if not atomic_folder._exchange(folder, folder):
        pytest.skip("this file system cannot exchange two names")
    chance = random.Random(5)
    for start in range(0, 20_000, 1000):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(start)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert len(versions(folder)) <= 1
        assert (folder / "notes.txt").read_text() == "mine"
    assert versions(folder)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_is_not_weights_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda *names: False)
    old, new = tmp_path / "model", tmp_path / ".model.unfinished"
    (old / "logs").mkdir(parents=True)
    (old / "logs" / "today").write_text("mine")
    (old / "iter_0000002").mkdir()
    (old / "iter_0000002" / "common.pt").write_text("mine")
    new.mkdir()
    for name in ("config.json", "model-00001-of-00003.safetensors"):
        (old / name).write_text("old")
    for name in ("config.json", "model.safetensors"):
        (new / name).write_text("new")
    atomic_folder.publish(new, old)
    found = sorted(entry.name for entry in old.iterdir())
    assert found == ["config.json", "iter_0000002", "logs", "model.safetensors"]
    assert (old / "config.json").read_text() == "new"
    assert (old / "logs" / "today").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
