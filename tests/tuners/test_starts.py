"""Training from folders that PEFT made, and commands that merge them."""

import contextlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swiftmeg.tuners.peft_format import Factors, HFAdapters
from tests.ranks import run_ranks
from tests.references import relative, transformers_loss
from tests.runs import TENSOR, command, export, run
from tests.tuners.lora_runs import adapters, flags, train, write_inputs
from tests.tuners.peft_made import base_model, edit_tensors, logits, make, reload

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", HEADS),
    "tied": ("qwen3", HEADS | {"tie_word_embeddings": True}),
}
ALONE = ["o_proj", "down_proj"]
"""Layers that Megatron fuses with no other, so that each can have an A of its own."""

STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"o_proj": 3}, "use_rslora": True},
    "plain": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 9}},
    "dora": {"use_dora": True, "init_lora_weights": "pissa"},
}
STILL = {"train_iters": 1, "lr": 0, "weight_decay": 0, "lora_rank": 4}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("starts"), MODELS)
    for name, settings in STARTS.items():
        make(folder / "llama", folder / f"{name}-made", target_modules=ALONE, **settings)
    return folder


@pytest.mark.parametrize("case", STARTS)
def test_training_starts_where_peft_left(work: Path, case: str) -> None:
    """PEFT's loss at the first step; what is written and continued is PEFT's adapter."""
    made = work / f"{case}-made"
    (line,) = train(work, "llama", case, 2, adapters=made, **TENSOR | STILL)
    peft = reload(work / "llama", made)
    with torch.no_grad():
        expected = transformers_loss(peft, work / "llama").item()
        plain = transformers_loss(base_model(work / "llama").eval(), work / "llama").item()
    assert relative(line["lm loss"], expected) <= 1e-5
    assert relative(expected, plain) > 1e-3
    ours, theirs = adapters(work, case, 1), load_file(made / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    written = json.loads((work / case / "iter_0000001-hf" / "adapter_config.json").read_text())
    assert written["init_lora_weights"] == STARTS[case].get("init_lora_weights", True)
    again = reload(work / "llama", work / case / "iter_0000001-hf")
    assert torch.equal(logits(again), logits(peft))

    options = {"finetune": "true", "train_iters": 1, "lr": 0, "weight_decay": 0}
    (line,) = train(work, "llama", f"{case}-on", adapter_load=work / case, **options)
    assert relative(line["lm loss"], expected) <= 1e-5
    wanted = logits(peft)
    for name, changes in (("lazy", {}), ("whole", {"test_convert_precision": "true"})):
        merged = export(
            work / f"{case}-{name}", 2, mcore_adapters=work / case, to_hf="true", **TENSOR | changes
        )
        found = logits(base_model(merged))
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


GROWN: dict[str, tuple[str, dict[str, Any]]] = {
    "saved": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "factors": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied": ("tied", {}),
    "untied": ("tied", {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize("case", GROWN)
def test_export_keeps_added_rows(work: Path, case: str) -> None:
    model, settings = GROWN[case]
    settings = {"target_modules": ["q_proj", "v_proj"]} | settings
    made = make(work / model, work / f"grown-{case}", rows=30, **settings)
    (made / "tokenizer_config.json").write_text(
        json.dumps(json.loads((work / model / "tokenizer_config.json").read_text()) | {"mark": 1})
    )
    merged = export(
        *(work / f"grown-{case}-merged", 2),
        adapters=made,
        model=work / model,
        merge_lora="true",
        test_convert_precision="true",
        **TENSOR,
    )
    found = base_model(merged)
    assert found.config.vocab_size == 1033
    assert found.get_input_embeddings().weight.shape[0] == 1033
    expected = logits(reload(work / model, made, 30))
    assert (logits(found) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert json.loads((merged / "tokenizer_config.json").read_text())["mark"] == 1
    with pytest.raises(RuntimeError, match=r"vocab_size 1033.*merge it with --to_hf true first"):
        export(work / "no", adapters=made, model=work / model, merge_lora="true", to_mcore="true")


UNTRAINABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "rows": ("llama", {"rows": 3}, "has 1006 rows"),
    "tokens": ("llama", {"trainable_token_indices": [5]}, "trainable_token_indices"),
    "one table": ("tied", {"modules_to_save": ["embed_tokens"]}, "tied embedding and head alone"),
    "base": ("llama", {"target_modules": ["lm_head"]}, "stores the base of lm_head.weight"),
    "mica": ("llama", {"init_lora_weights": "mica"}, "keeps every lora_B"),
    "bias": ("llama", {"bias": "lora_only"}, "lora_only"),
}


@pytest.mark.parametrize("case", UNTRAINABLE)
def test_what_can_only_be_merged_is_refused(work: Path, tmp_path: Path, case: str) -> None:
    model, settings, named = UNTRAINABLE[case]
    made = make(work / model, tmp_path / "made", **{"target_modules": ALONE} | settings)
    argv = flags(work, model, tmp_path / "run", STILL | {"adapters": made})
    with pytest.raises(RuntimeError, match=f"{named}.*merge it by swift export"):
        run("sft", 1, argv)


def test_factors_of_other_sizes_are_refused(work: Path, tmp_path: Path) -> None:
    """A single column must not be repeated over all of them."""
    made = make(work / "llama", tmp_path / "made", target_modules=ALONE)
    edit_tensors(made, lambda t: {k: v[:, :1] if "lora_A" in k else v for k, v in t.items()})
    argv = flags(work, "llama", tmp_path / "run", STILL | {"adapters": made})
    with pytest.raises(RuntimeError, match=r"the adapter of .*o_proj.weight does not fit"):
        run("sft", 1, argv)


def test_what_travels_between_ranks_is_no_larger_than_it_is() -> None:
    """Live factors are views of large buffers."""
    buffer = torch.zeros(1_000_000)
    view = buffer[:12].view(3, 4)
    found = HFAdapters({"a": Factors(view, view, 1.0, 1.0, buffer[:3])}, {"b": view})
    assert len(pickle.dumps(found)) > 1_000_000
    assert len(pickle.dumps(found.copied())) < 10_000


def train_and_listen(argv: list[str]) -> str:
    """`megatron sft` on one rank; returns what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        command("sft", argv)
    return said.getvalue()


def test_a_model_without_biases_is_said(work: Path, tmp_path: Path) -> None:
    argv = flags(work, "llama", tmp_path / "run", {"train_iters": 1, "lora_bias": "all"})
    (said,) = run_ranks(1, train_and_listen, argv)
    assert "--lora_bias all: the model has no biases" in said
