"""Adapters beside a model for inference are PEFT's; what it would pass over is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from swiftmeg.errors import UserError
from swiftmeg.inference.adapter import tokenizer_folder, with_adapter
from tests.tuners.peft_made import (
    base_model,
    edit_config,
    edit_tensors,
    logits,
    make,
    reload,
    write_models,
)

QV = ["q_proj", "v_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tables": ("llama", {"target_modules": [*QV, "embed_tokens", "lm_head"]}),
    "grown": ("llama", {"target_modules": QV, "rows": 5}),
    "grown-factors": ("biased", {"target_modules": [*QV, "embed_tokens", "lm_head"], "rows": 5}),
    "grown-saved": ("tied", {"target_modules": QV, "modules_to_save": ["lm_head"], "rows": 5}),
    "tokens": ("tied", {"target_modules": QV, "trainable_token_indices": [301, 302], "rows": 3}),
    "dora": ("llama", {"target_modules": QV, "use_dora": True}),
    "pissa": ("llama", {"target_modules": QV, "init_lora_weights": "pissa"}),
    "experts": ("moe", {"target_modules": QV, "target_parameters": ["mlp.experts.down_proj"]}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("infer")
    write_models(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_pefts(root: Path, tmp_path: Path, case: str) -> None:
    model, settings = CASES[case]
    folder = make(root / model, tmp_path / "adapter", **settings)
    found = with_adapter(base_model(root / model), folder)
    assert torch.equal(logits(found), logits(reload(root / model, folder, settings.get("rows", 0))))


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "a start that is lost": ({"init_lora_weights": "pissa_niter_4"}, dict, "pissa_niter_4"),
    "a key of a later PEFT": ({"invented": {"x": 1}}, dict, "invented"),
    "a tensor of another layer": (
        {},
        lambda t: t | {k.replace("layers.1", "layers.7"): v for k, v in t.items()},
        "layers.7",
    ),
    "a missing tensor": (
        {},
        lambda t: {k: v for k, v in t.items() if "1.self_attn.q_proj.lora_A" not in k},
        "q_proj.lora_A",
    ),
    "another rank": ({"r": 5}, dict, "cannot be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_passes_over_is_refused(root: Path, tmp_path: Path, case: str) -> None:
    config, change, named = REFUSED[case]
    folder = make(root / "llama", tmp_path / "adapter", target_modules=QV)
    edit_config(folder, **config)
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=named):
        with_adapter(base_model(root / "llama"), folder)


def test_a_tokenizer_beside_the_adapter_counts(root: Path, tmp_path: Path) -> None:
    assert tokenizer_folder([str(tmp_path)], root / "llama") == root / "llama"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_folder([str(tmp_path)], root / "llama") == tmp_path
