"""Each token's loss is the same packed with other samples, padded beside them, and alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from swiftmeg.data.collate import Collator
from tests.ranks import run_ranks
from tests.tiny import save_model

LENGTHS = [1, 7, 9, 698, 1024]
"""Awkward ones, and max_length."""


def token_losses(folder: str, batches: list[tuple[str, list[list[int]]]]) -> list[list[Any]]:
    """For each named batch of rows of tokens, collated that way, each row's losses as arrays."""
    from swiftmeg.args.commands import ExportArguments
    from swiftmeg.export.hf_reader import load_hf
    from swiftmeg.export.model import build_model
    from swiftmeg.models.build import dims_of
    from swiftmeg.models.hf import read_model
    from swiftmeg.trainers.forward import run_model, take_batch

    model = read_model(folder)
    namespace, models = build_model(ExportArguments(torch_dtype="float32"), model)
    load_hf(models, model.folder, model.family, model.config, dims_of(namespace))
    models[0].eval()  # Megatron's own default has dropout
    found = []
    for kind, rows in batches:
        collate = Collator(0, padding_free=kind != "padded")
        samples: list[Any] = [{"input_ids": row, "labels": row} for row in rows]
        batch = collate([samples] if kind == "packed" else samples)
        with torch.no_grad():
            losses = run_model(models[0], take_batch(iter([batch])))
        if kind == "padded":
            each = [row[: len(tokens)] for row, tokens in zip(losses, rows, strict=True)]
        else:
            each = list(losses[0, : sum(map(len, rows))].split([len(row) for row in rows]))
        found.append([row[:-1].numpy() for row in each])
    return found


MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 10,
        "linear_value_head_dim": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 28,
        "rms_norm_eps": 1e-2,
    },
}
"""Attention; and layers whose state must not outlive a sample."""


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_tokens_do_not_depend_on_neighbours(tmp_path: Path, name: str) -> None:
    model = tmp_path / name
    save_model(model, name, num_hidden_layers=2, max_position_embeddings=2048, **MODELS[name])
    torch.manual_seed(0)
    rows = [torch.randint(3, 60, (length,)).tolist() for length in LENGTHS]
    other = rows[::-1]
    batches = [
        *(("alone", [row]) for row in rows if len(row) > 1),
        ("packed", rows),
        ("packed", other),
        ("flat", rows),
        ("padded", rows),
    ]
    (found,) = run_ranks(1, token_losses, str(model), batches)
    alone = [[], *(losses[0] for losses in found[:-4])]
    in_order = {
        "packed": found[-4],
        "packed the other way round": found[-3][::-1],
        "flat": found[-2],
        "padded": found[-1],
    }
    for kind, losses in in_order.items():
        for length, row, expected in zip(LENGTHS, losses, alone, strict=True):
            assert len(row) == len(expected) == length - 1, kind
            if length > 1:
                # Products of other shapes round otherwise.
                others = kind == "padded" or name == "qwen3_next"
                allowed = 1e-6 * (abs(expected).max() if others else 1)
                assert abs(row - expected).max() <= allowed, (kind, length)
    assert torch.tensor(alone[-1]).std() > 0.01, "every loss is the same"
