"""Conversion needs host memory for one parameter at a time, whatever the model's size."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swiftmeg.export.hf_files import MAPPED_BYTES
from tests.ranks import run_ranks
from tests.tiny import save_model

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
MIB = 2**20
LARGEST = 2 * 2048 * 512 * 4  # bytes of [gate; up] in fp32, the largest parameter
ARGS = SimpleNamespace(
    torch_dtype="float32",
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    decoder_first_pipeline_num_layers=None,
    decoder_last_pipeline_num_layers=None,
    extra_megatron_kwargs={},
)


def resident(kinds: str = "Anon|Shmem|File") -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return sum(1024 * int(size) for size in re.findall(rf"Rss(?:{kinds}):\s+(\d+) kB", status))


def excess(work: Callable[[], None], kinds: str = "Anon|Shmem|File") -> int:
    """How many more bytes are in memory at the worst moment of some work than before."""
    before = worst = resident(kinds)
    done = threading.Event()

    def watch() -> None:
        nonlocal worst
        while not done.wait(0.001):
            worst = max(worst, resident(kinds))

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return worst - before


def convert_and_watch(folder: str, out: str) -> tuple[int, dict[str, int]]:
    """All weights' bytes, and the excess of loading a model, and of converting it both ways."""
    from megatron.training import global_vars

    from swiftmeg.export.hf_files import HFWeights
    from swiftmeg.export.hf_reader import HFSupply, load_hf
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.lazy_weights import OnDemand
    from swiftmeg.export.mcore_reader import CheckpointSupply
    from swiftmeg.export.model import build_model, save_mcore
    from swiftmeg.models.build import dims_of
    from swiftmeg.models.hf import read_model

    model = read_model(folder)
    common = (model.family, model.config)

    def build() -> tuple[list[Any], Any]:
        global_vars.destroy_global_vars()
        global_vars.unset_num_microbatches_calculator()
        namespace, models = build_model(ARGS, model)
        return models, dims_of(namespace)

    def to_mcore() -> None:
        models, dims = build()
        supply = HFSupply(HFWeights(folder, model.config), *common, dims)
        save_mcore(models, mcore, OnDemand(models, supply))

    def to_hf() -> None:
        models, dims = build()
        weights = OnDemand(models, CheckpointSupply(models, mcore))
        dtype = models[0].config.params_dtype
        save_hf(models, back, model.folder, *common, dims, dtype=dtype, weights=weights)

    mcore, back = Path(out) / "mcore", Path(out) / "back"
    mcore.mkdir()
    found = {"to mcore": excess(to_mcore), "to hf": excess(to_hf)}
    models, dims = build()
    weights = 0
    for chunk in models:
        for parameter in chunk.parameters():
            parameter.data.fill_(1.0)  # pages that were never written are not resident
            weights += parameter.nbytes
    found["load"] = excess(lambda: load_hf(models, folder, *common, dims), "Anon|Shmem")
    return weights, found


def merge_and_watch(folder: str, out: str) -> int:
    """The excess of writing a model with its adapters added."""
    from swiftmeg.args.tuner import LoraArguments
    from swiftmeg.export.hf_files import HFWeights
    from swiftmeg.export.hf_reader import HFSupply
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.lazy_weights import OnDemand
    from swiftmeg.export.model import build_model
    from swiftmeg.models.build import dims_of
    from swiftmeg.models.hf import read_model
    from swiftmeg.tuners.adapters import attach
    from swiftmeg.tuners.merge import Merging

    model = read_model(folder)
    namespace, models = build_model(ARGS, model)
    common = model.family, model.config, dims_of(namespace)
    attach(models, LoraArguments(lora_rank=4), seed=0)

    def merge() -> None:
        base = HFSupply(HFWeights(folder, model.config), *common)
        weights = OnDemand(models, Merging(models, base))
        target, dtype = Path(out) / "merged", models[0].config.params_dtype
        save_hf(models, target, model.folder, *common, dtype=dtype, weights=weights)

    return excess(merge)


def test_conversion_holds_one_parameter_at_a_time(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc to see the memory of a process")
    folder = save_model(tmp_path / "model", "llama", **SIZES)
    ((weights, found),) = run_ranks(1, convert_and_watch, str(folder), str(tmp_path))
    found["merge"] = run_ranks(1, merge_and_watch, str(folder), str(tmp_path))[0]
    # the HF parts, the joined parameter, HF files that are open; modules and freed memory stay
    allowed = 3 * LARGEST + MAPPED_BYTES + 160 * MIB
    assert weights > 1.5 * allowed
    for step, most in found.items():
        assert most < allowed, f"{step}: {most / MIB:.0f} of {allowed / MIB:.0f} MiB"
