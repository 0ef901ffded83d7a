"""Splits of layers over pipeline stages that cannot be, each in one line."""

from types import SimpleNamespace
from typing import Any

import pytest

from swiftmeg.args.pipeline import (
    check_interleaving,
    check_pipeline,
    layout_stages,
    virtual_stages,
)
from swiftmeg.errors import UserError

FLAGS = {
    "pipeline_model_parallel_size": 2,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "pipeline_model_parallel_layout": None,
    "micro_batch_size": 1,
    "global_batch_size": 8,
}


def flags(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**FLAGS | changes)


@pytest.mark.parametrize(
    ("layers", "changes", "parts"),
    [
        (4, {}, 1),
        (4, {"virtual_pipeline_model_parallel_size": 2}, 2),
        (8, {"num_layers_per_virtual_pipeline_stage": 1}, 4),
        (5, {"decoder_first_pipeline_num_layers": 2}, 1),
        (6, {"decoder_last_pipeline_num_layers": 2, "virtual_pipeline_model_parallel_size": 2}, 2),
        (5, {"account_for_loss_in_pipeline_split": True}, 1),
        (5, {"pipeline_model_parallel_layout": "Et|t*2|(t)*2|L"}, 2),
        (4, {"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": 1}, 1),
    ],
)
def test_splits_that_can_be(layers: int, changes: dict[str, Any], parts: int) -> None:
    check_pipeline(flags(**changes), layers)
    assert virtual_stages(flags(**changes), layers) == parts


@pytest.mark.parametrize(
    ("layers", "changes", "line"),
    [
        (5, {}, "5 layers cannot be split over --pipeline_model_parallel_size 2"),
        (5, {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
         "--virtual_pipeline_model_parallel_size needs --pipeline_model_parallel_size above 1"),
        (6, {"virtual_pipeline_model_parallel_size": 2}, "2 does not divide the 3 layers"),
        (6, {"num_layers_per_virtual_pipeline_stage": 2}, "2 does not divide the 3 layers"),
        (4, {"virtual_pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
         "say the same"),
        (5, {"decoder_first_pipeline_num_layers": 2, "account_for_loss_in_pipeline_split": True},
         "two ways to split"),
        (4, {"pipeline_model_parallel_layout": "Ett|tL"}, "has 3 layers, the model has 4"),
        (3, {"pipeline_model_parallel_layout": "Ett|t|L"}, "has 3 stages, which .* 2 does not"),
        (3, {"pipeline_model_parallel_layout": "tt|tL"}, "must be E, one t"),
        (3, {"pipeline_model_parallel_layout": "Ett|tL",
             "virtual_pipeline_model_parallel_size": 2}, "says the whole split: drop --virtual"),
    ],
)  # fmt: skip
def test_splits_that_cannot_be(layers: int, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        check_pipeline(flags(**changes), layers)


def test_model_parts_need_whole_rounds_of_micro_batches() -> None:
    args = flags(virtual_pipeline_model_parallel_size=2, global_batch_size=6)
    check_interleaving(args, 4, 1)
    with pytest.raises(UserError, match="makes 3 micro-batches a step"):
        check_interleaving(args, 4, 2)


def test_a_layout_is_written_out() -> None:
    assert layout_stages("Et*3|(tt|)*2,m|L") == ["Ettt", "tt", "tt", "m", "L"]
