"""`swift export` of damaged checkpoints, and to places that do not take the result."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint import FileSystemReader

from swiftmeg.errors import UserError
from swiftmeg.export.convert import check_target
from tests.kills import limit_inside
from tests.ranks import run_ranks
from tests.runs import command, run
from tests.tiny import save_model


def test_a_flipped_byte_ends_the_conversion_and_leaves_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen3")
    flags = ["--model", str(folder), "--to_mcore", "true", "--output_dir", str(tmp_path / "mcore")]
    run("export", 1, flags)
    iteration = tmp_path / "mcore" / "iter_0000001"
    entries = FileSystemReader(iteration).read_metadata().storage_data.values()
    largest = max(entries, key=lambda entry: entry.length)
    file = iteration / largest.relative_path
    content = bytearray(file.read_bytes())
    content[largest.offset + largest.length // 2] ^= 1
    file.write_bytes(content)
    back = ["--mcore_model", str(tmp_path / "mcore"), "--to_hf", "true"]
    with pytest.raises(RuntimeError, match=rf"{file.name} is damaged: bytes \d+ to \d+"):
        run("export", 1, [*back, "--output_dir", str(tmp_path / "hf")])
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "mcore"}


def convert_without_room(pattern: str, argv: list[str]) -> None:
    limit_inside(pattern, 50_000)
    command("export", argv)


@pytest.mark.parametrize("world", [1, 2])
def test_no_room_ends_in_one_line(tmp_path: Path, world: int) -> None:
    folder = save_model(tmp_path / "model", "qwen3")
    there = ["--model", str(folder), "--to_mcore", "true", "--output_dir", str(tmp_path / "mcore")]
    line = "UserError: --output_dir .*: File too large: nothing is kept; make room or"
    with pytest.raises(RuntimeError, match=line):
        run_ranks(world, convert_without_room, r"distcp$", there)
    assert not (tmp_path / "mcore").exists()
    run("export", 1, there)
    back = ["--mcore_model", str(tmp_path / "mcore"), "--to_hf", "true"]
    back += ["--output_dir", str(tmp_path / "hf")]
    with pytest.raises(RuntimeError, match=line):
        run_ranks(world, convert_without_room, r"safetensors$", back)
    assert not (tmp_path / "hf").exists()


def test_a_mount_point_is_no_target() -> None:
    place = Path("/dev/shm")
    if not place.is_mount() or not os.access(place, os.W_OK):
        pytest.skip("needs a file system that is mounted where it can be written to")
    args = SimpleNamespace(output_dir=str(place), exist_ok=True)
    with pytest.raises(UserError, match="/dev/shm is where a file system is mounted"):
        check_target(args, "x")
