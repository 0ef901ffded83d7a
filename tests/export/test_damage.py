"""`swift export` of a damaged Megatron checkpoint."""

from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.export.test_precision import convert
from tests.ranks import run_ranks
from tests.tiny import save_model


def test_a_flipped_byte_ends_the_conversion_and_leaves_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen3")
    flags = ["--model", str(folder), "--to_mcore", "true", "--output_dir", str(tmp_path / "mcore")]
    run_ranks(1, convert, flags)
    iteration = tmp_path / "mcore" / "iter_0000001"
    entries = FileSystemReader(iteration).read_metadata().storage_data.values()
    largest = max(entries, key=lambda entry: entry.length)
    file = iteration / largest.relative_path
    content = bytearray(file.read_bytes())
    content[largest.offset + largest.length // 2] ^= 1
    file.write_bytes(content)
    back = ["--mcore_model", str(tmp_path / "mcore"), "--to_hf", "true"]
    with pytest.raises(RuntimeError, match=rf"{file.name} is damaged: bytes \d+ to \d+"):
        run_ranks(1, convert, [*back, "--output_dir", str(tmp_path / "hf")])
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "mcore"}
