"""Loading an HF folder needs host memory for one parameter at a time, whatever the model's size."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ranks import run_ranks
from tests.tiny import save_model

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
MIB = 2**20
LARGEST = 2 * 2048 * 512 * 4  # bytes of [gate; up] in fp32, the largest parameter


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def load_and_watch(folder: str) -> tuple[int, int]:
    """Load a model into one process; returns excess bytes at the worst moment, and weights."""
    from swiftmeg.export.load import load_hf
    from swiftmeg.export.model import build_model
    from swiftmeg.models.build import dims_of
    from swiftmeg.models.hf import read_model

    model = read_model(folder)
    args = SimpleNamespace(
        torch_dtype="float32",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        extra_megatron_kwargs={},
    )
    namespace, models = build_model(args, model)
    weights = 0
    for chunk in models:
        for parameter in chunk.parameters():
            parameter.data.fill_(1.0)  # pages that were never written are not resident
            weights += parameter.nbytes
    before = worst = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal worst
        while not done.wait(0.001):
            worst = max(worst, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    load_hf(models, folder, model.family, model.config, dims_of(namespace))
    done.set()
    watcher.join()
    return worst - before, weights


def test_loading_holds_one_parameter_at_a_time(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc to see the memory of a process")
    folder = save_model(tmp_path, "llama", **SIZES)
    ((excess, weights),) = run_ranks(1, load_and_watch, str(folder))
    assert weights > 10 * LARGEST
    # the HF parts, the joined parameter, and what the allocator keeps
    assert excess < 3 * LARGEST + 32 * MIB, f"{excess / MIB:.0f} MiB"
