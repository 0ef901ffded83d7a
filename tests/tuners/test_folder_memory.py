"""Writing a PEFT folder takes memory for its tensors, not for buffers that they are views of."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.conversion import Layout, arguments
from tests.layouts.test_memory import MIB, SIZES, excess
from tests.ranks import run_ranks
from tests.tiny import save_model

RANK = 128


def into_one_buffer(models: list[Any]) -> int:
    """Let all trained parameters be views, as in Megatron's buffers; returns the bytes of all."""
    trained = [p for chunk in models for p in chunk.parameters() if p.requires_grad]
    buffer = torch.cat([parameter.data.flatten() for parameter in trained])
    for parameter, part in zip(trained, buffer.split([p.numel() for p in trained]), strict=True):
        parameter.data = part.view_as(parameter)
    return buffer.nbytes


def write_and_watch(folder: str, out: str, layout: Layout) -> tuple[int, int]:
    """Bytes of this rank's adapters, and the excess of writing those of all ranks."""
    from swiftmeg.args.tuner import LoraArguments
    from swiftmeg.export.model import build_model
    from swiftmeg.models.build import dims_of
    from swiftmeg.models.hf import read_model
    from swiftmeg.tuners.adapters import attach
    from swiftmeg.tuners.peft_folder import save_peft

    model = read_model(folder)
    namespace, models = build_model(arguments(layout), model)
    args: Any = LoraArguments(train_type="lora", lora_rank=RANK)
    args.load = args.template = args.system = None
    attach(models, args, seed=0)
    ours, dims = into_one_buffer(models), dims_of(namespace)
    import peft  # noqa: F401  (what it takes up is not the folder's)

    return ours, excess(lambda: save_peft(models, Path(out), args, model, dims))


@pytest.mark.parametrize("layout", [Layout(1), Layout(2, pipeline=2)], ids=["one", "pp2"])
def test_a_folder_takes_twice_its_tensors(tmp_path: Path, layout: Layout) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc to see the memory of a process")
    folder = save_model(tmp_path / "model", "llama", **SIZES | {"num_hidden_layers": 8})
    found = run_ranks(layout.world, write_and_watch, str(folder), str(tmp_path / "out"), layout)
    whole = sum(ours for ours, _ in found)
    assert whole > 30 * MIB
    for _, most in found:
        # what is gathered, a copy of it and the file's; with whole buffers it was 12 times
        assert most < 3 * whole + 40 * MIB, f"{most / MIB:.0f} MiB for {whole / MIB:.0f}"
