"""Many conversions in one process group: what ranks run for the tests of families."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class Layout:
    """How ranks share a model."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None


def arguments(layout: Layout, dtype: str = "float32") -> SimpleNamespace:
    """What `build_model` reads of a command's arguments."""
    return SimpleNamespace(
        torch_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        extra_megatron_kwargs={},
    )


def build(folder: Path, layout: Layout, dtype: str = "float32", **changes: Any) -> Any:
    """The model of a folder, its chunks on this rank without weights, and its sizes."""
    from megatron.training import global_vars

    from swiftmeg.export.model import build_model
    from swiftmeg.models.build import dims_of
    from swiftmeg.models.hf import read_model

    global_vars.destroy_global_vars()
    global_vars.unset_num_microbatches_calculator()
    model = read_model(str(folder))
    for name, value in changes.items():
        object.__setattr__(model, name, value)
    namespace, models = build_model(arguments(layout, dtype), model)
    with torch.no_grad():
        for chunk in models:
            for tensor in (*chunk.parameters(), *chunk.buffers()):
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
    return model, models, dims_of(namespace)


def difference(folder: Path, layout: Layout, mutation: Any = None) -> float | None:
    """Load a specimen; the largest difference of its logits, on the last stage.

    `mutation` changes its family before.
    """
    from swiftmeg.export.hf_reader import load_hf
    from swiftmeg.export.precision import mcore_logits
    from swiftmeg.models.hf import read_model

    family = read_model(str(folder)).family
    changes = {} if mutation is None else {"family": mutation(family)}
    model, models, dims = build(folder, layout, **changes)
    load_hf(models, folder, model.family, model.config, dims)
    expected = torch.load(folder / "expected.pt")
    logits = mcore_logits(models, expected["ids"], dims.vocab_size)
    return None if logits is None else float((logits - expected["logits"]).abs().max())


def convert(root: Path, out: Path, name: str, layout: Layout) -> float | None:
    """Specimen `name` there and back; the largest difference of logits, on the last stage."""
    from swiftmeg.export.hf_reader import load_hf
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.lazy_weights import OnDemand
    from swiftmeg.export.mcore_reader import CheckpointSupply
    from swiftmeg.export.model import save_mcore
    from swiftmeg.export.precision import mcore_logits

    folder, target = root / name, out / name
    model, models, dims = build(folder, layout)
    load_hf(models, folder, model.family, model.config, dims)
    expected = torch.load(folder / "expected.pt")
    logits = mcore_logits(models, expected["ids"], dims.vocab_size)
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    save_mcore(models, target / "mcore")
    with torch.no_grad():
        for chunk in models:
            for tensor in chunk.state_dict().values():
                if isinstance(tensor, torch.Tensor):
                    tensor.fill_(float("nan"))
    save_hf(
        models,
        target / "hf",
        folder,
        model.family,
        model.config,
        dims,
        dtype=torch.float32,
        max_shard_bytes=60_000,
        weights=OnDemand(models, CheckpointSupply(models, target / "mcore")),
    )
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(target / "mcore")
    if logits is None:
        return None
    return float((logits - expected["logits"]).abs().max())


def convert_all(root: str, out: str, names: list[str], layout: Layout) -> dict[str, Any]:
    """`convert` for each name; a failure is its text, as every rank meets it."""
    import traceback

    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = convert(Path(root), Path(out), name, layout)
        except Exception:
            results[name] = traceback.format_exc()
    return results
