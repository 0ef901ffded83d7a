"""HF -> Megatron -> HF in every layout: bit-exact tensors and equal logits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
    from swiftmeg.export.load import load_hf
    from swiftmeg.export.model import build_model, load_mcore, save_mcore
    from swiftmeg.export.precision import hf_logits, mcore_logits, sample_ids
    from swiftmeg.export.save import save_hf
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
    load_mcore(models, f"{out}/mcore")
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
    world, tp, pp = layout
    results = run_ranks(world, convert_both_ways, str(folder), str(tmp_path), tp, pp, "float32")
    compared = [result for result in results if result is not None]
    assert compared
    for largest, scale in compared:
        assert largest <= 1e-4
        assert scale > 1.0
    before, after = tensors(folder), tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor), key
