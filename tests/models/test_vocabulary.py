"""--new_special_tokens: what grows, what stays, and that it reaches training and export."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swiftmeg.args.tuner import LoraArguments
from swiftmeg.errors import UserError
from swiftmeg.models.hf import read_model
from swiftmeg.models.vocabulary import read_tokens, untrained_rows, with_new_tokens
from swiftmeg.tuners.peft_folder import base_folder
from tests.runs import TENSOR, export, run, training
from tests.tiny import save_model

NEW = ["<think>", "</think>", "<工具>"]
NEW_TOKENS = {"new_special_tokens": NEW}
USED = 260  # tokens of the tests' tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFTMEG_CACHE", str(tmp_path / "cache"))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("rows", "size", "options"),
    [
        (USED, 384, {}),
        (USED, 384, {"tie_word_embeddings": True}),
        (USED + 2, 384, {"max_shard_size": "50KB"}),
        (1003, 1003, {"dtype": torch.bfloat16}),  # has rows left
    ],
)
def test_the_vocabulary_grows(
    tmp_path: Path, rows: int, size: int, options: dict[str, Any]
) -> None:
    folder = save_model(tmp_path / "model", "llama", vocab_size=rows, **options)
    before = hashes(folder)
    model = with_new_tokens(read_model(str(folder)), NEW)
    assert hashes(folder) == before
    assert model.folder.name == "model"
    assert model.named == str(folder)
    assert model.megatron_args["vocab_size"] == size
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    ids = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in NEW]
    assert ids == [[USED], [USED + 1], [USED + 2]]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    old = AutoModelForCausalLM.from_pretrained(folder)
    new = AutoModelForCausalLM.from_pretrained(model.folder)
    for kind in ("get_input_embeddings", "get_output_embeddings"):
        was, now = (getattr(each, kind)().weight.detach().float() for each in (old, new))
        assert now.shape == (size, 48)
        kept = torch.tensor([row not in range(USED, USED + 3) for row in range(rows)])
        assert torch.equal(now[:rows][kept], was[kept])
        mean = was[:USED].mean(0)
        bound = 1e-3 if now.dtype == torch.float32 and "dtype" not in options else 1e-2
        for row in (*range(USED, USED + 3), *range(rows, size)):
            assert torch.allclose(now[row], mean, atol=bound)
    text = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(old(text).logits[..., :USED], new(text).logits[..., :USED])
    # The next process takes the same folder, and a folder that grew has all tokens.
    assert with_new_tokens(read_model(str(folder)), NEW).folder == model.folder
    assert with_new_tokens(model, NEW) is model


def test_tokens_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("<b>\n\n <c> \n<a>\n")
    assert read_tokens(["<a>", str(tmp_path / "more.txt")]) == ["<a>", "<b>", "<c>"]
    with pytest.raises(UserError, match=r"--new_special_tokens none.txt: cannot be read"):
        read_tokens(["none.txt"])
    with pytest.raises(UserError, match="' ' is no token"):
        read_tokens([" "])


def one_layer(tmp_path: Path) -> tuple[Path, list[str]]:
    """A model whose rows two ranks cannot share, and flags of a run with it."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    folder = save_model(tmp_path / "model", "qwen3", vocab_size=USED + 1, **sizes)
    row = {"query": "a <工具> b", "response": "<think>so</think> yes"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    steps = {"train_iters": 2, "global_batch_size": 2, "lr": 1e-2}
    return folder, training(tmp_path, tmp_path / "out", **steps, **TENSOR)


def test_training_and_export(tmp_path: Path) -> None:
    """args.json hands the tokens on."""
    folder, argv = one_layer(tmp_path)
    run("sft", 2, [*argv, "--new_special_tokens", *NEW])
    assert json.loads((tmp_path / "out" / "args.json").read_text())["model"] == str(folder)
    target = tmp_path / "hf"
    export(target, to_hf="true", mcore_model=tmp_path / "out")
    begun = with_new_tokens(read_model(str(folder)), NEW).folder
    first = AutoModelForCausalLM.from_pretrained(begun).get_input_embeddings().weight
    assert json.loads((target / "config.json").read_text())["vocab_size"] == 384
    assert AutoTokenizer.from_pretrained(target).convert_tokens_to_ids(NEW[2]) == USED + 2
    rows = AutoModelForCausalLM.from_pretrained(target).get_input_embeddings().weight
    moved = (rows - first).abs().amax(1) > 1e-3
    assert moved[USED : USED + 3].tolist() == [True] * 3
    assert not moved[USED + 3 :].any()
    assert not any(path.is_symlink() for path in target.iterdir())


def test_adapters_leave_the_rows_as_they_are(tmp_path: Path) -> None:
    def warning(**flags: Any) -> str | None:
        args = LoraArguments(**flags)
        return untrained_rows(SimpleNamespace(**vars(args), is_lora=args.is_lora, **NEW_TOKENS))

    assert "--modules_to_save word_embeddings" in (warning(train_type="lora") or "")
    assert warning() is None
    assert warning(train_type="lora", modules_to_save=["word_embeddings"]) is None
    assert warning(train_type="lora", target_modules=["all-embedding"]) is None
    # PEFT needs the model that has the tokens.
    model = with_new_tokens(read_model(str(save_model(tmp_path / "model", "llama"))), NEW)
    args = SimpleNamespace(load=None, model=model.named)
    assert base_folder(args, model) == str(model.folder) != model.named
