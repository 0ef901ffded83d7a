"""A step of adapters beside less common layers is PEFT's; tests/matrix/ has the other kinds."""

from pathlib import Path
from typing import Any

import pytest

from tests.matrix.cases import LORA, Row, write_rows
from tests.matrix.harness import BOUND, check_trained, compare, one_step, run, transformers_step
from tests.tiny import save_model

ROWS: dict[str, tuple[Row, dict[str, Any]]] = {
    # one gate_up_proj, norms before and after
    "glm4": (Row("glm4-lora", "tp2 sp", "packed"), {}),
    # norms across heads, after attention and MLP only
    "olmo2": (Row("olmo2-lora", "tp2", "padded", 4), {}),
    # sinks, windows, experts with biases, which have no adapters
    "gpt_oss": (
        Row("gpt_oss-lora", "tp2 sp ep2 etp1", "padding_free", 2),
        {
            "target_modules": "linear_qkv linear_proj all-router",
            "moe_aux_loss_coeff": 0,
        },
    ),
}
SIZES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 11},
}


@pytest.mark.parametrize("family", ROWS)
def test_step_is_pefts(tmp_path: Path, family: str) -> None:
    row, flags = ROWS[family]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    save_model(tmp_path / row.model, family, **heads | SIZES.get(family, {}))
    write_rows(tmp_path)
    found = run(tmp_path, row, **LORA | flags)
    assert check_trained(found) == []
    expected = transformers_step(tmp_path, row.model, found)
    for key, (value, where) in compare(one_step(found), expected).items():
        assert value <= BOUND, f"{key} differs by {value} at {where}"
