"""HF -> Megatron -> HF in every layout: bit-exact tensors and equal logits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.ranks import run_ranks
from tests.tiny import save_model

# (family, sizes that override tests.tiny.SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": (
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "hidden_size": 96}),
    "qwen3": ("qwen3", {}),
}

# (world, TP, PP); 3 KV heads divide by 1 and 3, so TP 2 and 4 take models with other head counts
LAYOUTS = [(1, 1, 1), (2, 1, 2), (3, 3, 1), (4, 1, 4)]
EVEN_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12, "hidden_size": 64}
EVEN_LAYOUTS = [(2, 2, 1), (4, 4, 1), (4, 2, 2)]

CASES = [(name, layout, {}) for name in MODELS for layout in LAYOUTS] + [
    (name, layout, EVEN_HEADS) for name in MODELS for layout in EVEN_LAYOUTS
]


def convert_both_ways(
    folder: str, out: str, tp: int, pp: int, dtype: str
) -> tuple[float, float] | None:
    """Load, compare logits, save and reload as mcore, save as HF; on every rank of a layout."""
    from swiftmeg.export.hf_reader import load_hf
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.lazy_weights import fill_all
    from swiftmeg.export.mcore_reader import CheckpointSupply
    from swiftmeg.export.model import build_model, save_mcore
    from swiftmeg.export.precision import hf_logits, mcore_logits, sample_ids
    from swiftmeg.models.build import dims_of
    from swiftmeg.models.hf import read_model

    model = read_model(folder)
    args = SimpleNamespace(
        torch_dtype=dtype,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        extra_megatron_kwargs={},
    )
    namespace, models = build_model(args, model)
    dims = dims_of(namespace)
    load_hf(models, folder, model.family, model.config, dims)
    ids = sample_ids(model.tokenizer())
    logits = mcore_logits(models, ids, dims.vocab_size)
    Path(out).mkdir(parents=True, exist_ok=True)
    save_mcore(models, f"{out}/mcore")
    with torch.no_grad():
        for chunk in models:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    fill_all(models, CheckpointSupply(models, Path(f"{out}/mcore")))
    save_hf(
        models,
        Path(out) / "hf",
        Path(folder),
        model.family,
        model.config,
        dims,
        dtype=namespace.params_dtype,
        max_shard_bytes=200_000,
    )
    if logits is None:
        return None
    reference = hf_logits(Path(folder), ids)
    return (logits - reference).abs().max().item(), reference.abs().max().item()


def round_trip(folder: Path, out: Path, world: int, tp: int, pp: int, dtype: str) -> None:
    """Assert equal logits and bit-exact tensors for one model in one layout."""
    results = run_ranks(world, convert_both_ways, str(folder), str(out), tp, pp, dtype)
    compared = [result for result in results if result is not None]
    assert compared
    for largest, scale in compared:
        assert largest <= 1e-4
        assert scale > 1.0
    before, after = tensors(folder), tensors(out / "hf")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor), key


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys()
        found.update(part)
    return found


@pytest.mark.parametrize(
    ("name", "layout", "heads"), CASES, ids=[f"{n}-tp{w[1]}-pp{w[2]}" for n, w, _ in CASES]
)
def test_round_trip_is_exact(
    name: str, layout: tuple[int, int, int], heads: dict[str, Any], tmp_path: Path
) -> None:
    family, sizes = MODELS[name]
    folder = save_model(tmp_path / "model", family, **(sizes | heads))
    round_trip(folder, tmp_path, *layout, "float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_is_exact_in_half_precision_and_in_shards(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "qwen3", dtype, "100KB", **EVEN_HEADS)
    assert len(list(folder.glob("*.safetensors"))) > 2
    name = str(dtype).removeprefix("torch.")
    round_trip(folder, tmp_path, 2, 2, 1, name)
    written = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert written[0] == f"model-00001-of-{len(written):05d}.safetensors"
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rope_scaling_is_that_of_transformers(family: str, scaling: str, tmp_path: Path) -> None:
    """The sample is longer than max_position_embeddings, which makes a difference to `dynamic`."""
    rope = {"rope_type": scaling, "rope_theta": 1000.0, **SCALINGS[scaling]}
    sizes = {"rope_parameters": rope, "max_position_embeddings": 64, "num_hidden_layers": 2}
    if family == "qwen2":
        sizes["hidden_size"] = 96
    folder = save_model(tmp_path / "model", family, **sizes)
    round_trip(folder, tmp_path, 1, 1, 1, "float32")
