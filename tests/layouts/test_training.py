"""Losses over a set of rows are those of transformers; tests/matrix/ compares training steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.references import relative, transformers_loss, write_rows
from tests.runs import PIPELINE, SEQUENCE, train_steps
from tests.tiny import save_model

QWEN3 = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2-sp-padded": (
        2,
        SEQUENCE | {"padding_free": "false", "micro_batch_size": 2, "loss_scale": "react"},
    ),
    "pp2-cp2": (4, PIPELINE | {"context_parallel_size": 2, "loss_scale": "last_round+react"}),
    "dp2": (2, {}),
}
"""Processes and flags of a layout, some with weights of tokens in the loss."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    save_model(folder / "qwen3", "qwen3", **QWEN3)
    write_rows(folder)
    return folder


FROZEN = {"lr": 0, "train_iters": 1, "global_batch_size": 10, "no_save_rng": "true"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_is_the_loss_over_all_rows(work: Path, layout: str) -> None:
    """20 rows in global batches of 8: the last one is filled up, and that must not show."""
    from transformers import AutoModelForCausalLM

    world, flags = LAYOUTS[layout]
    flags = flags | FROZEN | {"val_dataset": work / "rows.jsonl", "global_batch_size": 8}
    lines = train_steps(work, "qwen3", f"eval-{layout.replace(' ', '-')}", world, flags)
    model = AutoModelForCausalLM.from_pretrained(work / "qwen3", dtype=torch.float32)
    with torch.no_grad():
        options = {key: value for key, value in flags.items() if key == "loss_scale"}
        expected = transformers_loss(model, work / "qwen3", **options).item()
        unweighted = transformers_loss(model, work / "qwen3").item()
    assert relative(lines[-1]["eval_lm loss"], expected) <= 1e-5
    assert ("loss_scale" in flags) == (relative(expected, unweighted) > 1e-2)


def test_pt_trains_on_every_token(work: Path) -> None:
    from transformers import AutoModelForCausalLM

    flags = FROZEN | {"use_chat_template": "false", "loss_scale": "all", "global_batch_size": 20}
    (line,) = train_steps(work, "qwen3", "pt", 1, flags)
    model = AutoModelForCausalLM.from_pretrained(work / "qwen3", dtype=torch.float32)
    options = {"use_chat_template": False, "loss_scale": "all"}
    with torch.no_grad():
        expected = transformers_loss(model, work / "qwen3", **options).item()
    assert relative(line["lm loss"], expected) <= 1e-5
