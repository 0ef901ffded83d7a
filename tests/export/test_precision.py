"""--test_convert_precision where the conversion rounds the weights."""

from pathlib import Path
from typing import Any

import pytest

from tests.runs import export
from tests.sizes import ERNIE, EXPERTS
from tests.tiny import save_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "fp32-bias": EXPERTS["deepseek_v3"],  # routers' bias stays as it is
    "fp32-router": ("ernie4_5_moe", ERNIE),  # their weights too
}


@pytest.mark.parametrize("name", MODELS)
def test_fp32_weights_are_rounded_on_both_sides(name: str, tmp_path: Path) -> None:
    family, sizes = MODELS[name]
    folder = save_model(tmp_path / "model", family, **sizes)
    flags = {"torch_dtype": "bfloat16", "test_convert_precision": "true"}
    export(tmp_path / "mcore", model=folder, to_mcore="true", **flags)
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").exists()
