"""DoRA in every layout is what PEFT computes; the merged model is PEFT's, too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix.cases import Row, write_inputs
from tests.matrix.harness import BOUND, check_trained, compare, one_step, run, transformers_step
from tests.runs import PIPELINE, SEQUENCE, TENSOR, export, load_folder
from tests.runs import run as run_command
from tests.tuners import lora_runs
from tests.tuners.peft_made import base_model, logits

DORA = {"use_dora": "true"}
ATTENTION = {"target_modules": "linear_qkv linear_proj"}
ALMOST_NONE = {"lora_dropout": 1e-12}
"""Dropout that drops nothing, but takes the way of dropout."""

ROWS: dict[str, tuple[Row, dict[str, Any]]] = {
    "tables": (Row("dense-qk-lora", "tp2 sp pp2", "padding_free", 2), {}),
    "biases": (Row("dense-lora", "tp2", "padded", 4), ALMOST_NONE),
    "sequence": (Row("dense-qk-lora", "tp2 sp", "packed", 1), ALMOST_NONE),
    "context": (Row("dense-lora", "cp2", "packed", 2), {}),
    "experts": (Row("moe-lora", "tp2 sp ep2 etp1", "padded", 2), ATTENTION),
    "latent": (
        Row("mla-lora", "tp2 sp", "padding_free", 2),
        {
            "target_modules": "linear_q_down_proj linear_q_up_proj linear_kv_down_proj "
            "linear_kv_up_proj linear_proj"
        },
    ),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dora")
    write_inputs(folder, {row.model for row, _ in ROWS.values()})
    return folder


def peft_model(work: Path, model: str, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base_model(work / model), folder)


@pytest.mark.parametrize("case", ROWS)
def test_step_and_merged_weights_are_pefts(work: Path, case: str) -> None:
    row, changes = ROWS[case]
    found = run(work, row, name=case, **DORA | changes)
    assert check_trained(found) == []
    assert found["copies"] == []
    lengths = [name for name in found["gradients"] if "magnitude" in name]
    assert lengths
    expected = transformers_step(work, row.model, found)
    for key, (value, where) in compare(one_step(found), expected).items():
        assert value <= BOUND, f"{key} differs by {value} at {where}"
    merged = peft_model(work, row.model, found["folder"] / "adapters").merge_and_unload()
    target = work / f"{case}-peft"
    merged.save_pretrained(target)
    ours, theirs = load_folder(found["folder"] / "weights"), load_folder(target)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    """Two steps on two ranks, with another rank and alpha in places."""
    flags = DORA | {
        "target_modules": ["all-linear", "all-embedding", "output_layer"],
        "rank_pattern": '{"linear_proj": 2, "layers.1.mlp.linear_fc1": 3}',
        "alpha_pattern": '{"linear_qkv": 7.5}',
        "train_iters": 2,
        "global_batch_size": 16,
    }
    lora_runs.train(work, "dense-qk-lora", "trained", 2, **SEQUENCE, **flags)
    return work / "trained"


def test_a_checkpoint_and_its_folder_merge_alike(work: Path, trained: Path) -> None:
    folder = trained / "iter_0000002-hf"
    config = peft_model(work, "dense-qk-lora", folder).peft_config["default"]
    assert config.use_dora
    assert config.rank_pattern["o_proj"] == 2
    assert config.alpha_pattern["q_proj"] == 7.5
    expected = logits(peft_model(work, "dense-qk-lora", folder))
    assert (logits(base_model(work / "dense-qk-lora")) - expected).abs().max() > 0.1
    ways: dict[str, dict[str, Any]] = {
        "lazy": {"world": 2, "mcore_adapters": trained, "to_hf": "true", **TENSOR},
        "whole": {
            "mcore_adapters": trained,
            "to_hf": "true",
            "test_convert_precision": "true",
            "torch_dtype": "bfloat16",
        },
        "folder": {
            "world": 2,
            "adapters": folder,
            "merge_lora": "true",
            "test_convert_precision": "true",
            **TENSOR,
        },
    }
    for name, flags in ways.items():
        found = logits(base_model(export(work / name, **flags)))
        bound = 5e-2 if "torch_dtype" in flags else 1e-5
        assert (found - expected).abs().max() <= bound * expected.abs().max(), name


def test_training_goes_on_from_checkpoint_and_folder(work: Path, trained: Path) -> None:
    """A step without a learning rate leaves the same bits, in other layouts too."""
    still = {"train_iters": 1, "lr": 0, "weight_decay": 0, "global_batch_size": 16}
    first = lora_runs.adapters(work, "trained", 2)
    assert any(name.endswith("lora_magnitude_vector") for name in first)
    lora_runs.train(
        *(work, "dense-qk-lora", "anew", 2),
        **PIPELINE | still,
        adapter_load=trained,
        finetune="true",
    )
    folder = {"adapters": trained / "iter_0000002-hf", "lora_rank": 4}
    lora_runs.train(work, "dense-qk-lora", "from-folder", 2, **TENSOR | still | folder)
    for name in ("anew", "from-folder"):
        again = lora_runs.adapters(work, name, 1)
        assert again.keys() == first.keys()
        assert [key for key in first if not torch.equal(again[key], first[key])] == []


def test_layers_that_peft_cannot_lengthen_are_refused(work: Path) -> None:
    flags = lora_runs.flags(work, "moe-lora", work / "refused", DORA)
    with pytest.raises(RuntimeError, match="--use_dora true reaches no MLP or router"):
        run_command("sft", 1, flags)
    unused = {"rank_pattern": '{"linear_x": 2}'}
    flags = lora_runs.flags(work, "dense-lora", work / "refused", unused)
    with pytest.raises(RuntimeError, match="--rank_pattern linear_x fits no module"):
        run_command("sft", 1, flags)
