"""Preparing data: what a model cannot take is found, and what is left out is said."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from swiftmeg.args.check import check_training
from swiftmeg.args.commands import PtArguments, RlhfArguments, SftArguments
from swiftmeg.args.read import read_training_arguments
from swiftmeg.cli.data import main as inspect
from swiftmeg.errors import UserError
from swiftmeg.trainers.data import prepare_data
from swiftmeg.trainers.pairs import prepare_pairs
from tests.tiny import save_model

USED = 260  # tokens of the tests' tokenizer


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWIFTMEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def model_with_tokens_beyond(*tokens: str, **sizes: Any) -> str:
    """A model whose tokenizer knows tokens that the vocabulary has no rows for."""
    folder = save_model(Path("model"), "llama", **{"vocab_size": USED, **sizes})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def edit(folder: str, name: str, **values: Any) -> None:
    path = Path(folder, name)
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in values}
    path.write_text(json.dumps(kept | {k: v for k, v in values.items() if v is not None}))


def write(name: str, texts: list[str]) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "question"},
                {"role": "assistant", "content": text},
            ],
            "rejected_response": f"not {text}",
        }
        for text in texts
    ]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def read(*flags: str, cls: type[Any] = SftArguments, model: str = "model") -> tuple[Any, Any]:
    line = ["--model", model, "--train_iters", "1", "--global_batch_size", "1", *flags]
    args, _, found = read_training_arguments(cls, line, "megatron sft")
    return args, found


TEXTS = ["yes"] * 7 + ["call <tool>"] + ["no"] * 3


@pytest.mark.parametrize(
    ("flags", "cls"),
    [
        ("", SftArguments),
        ("", PtArguments),
        ("--packing true --max_length 64", SftArguments),
        ("--lazy_tokenize true", SftArguments),
        ("--lazy_tokenize true --dataset_num_proc 2 --dataset_shuffle false", SftArguments),
        ("--streaming true", SftArguments),
        ("--streaming true --packing true --max_length 64", SftArguments),
        ("--loss_scale last_round --truncation_strategy right", SftArguments),
    ],
)
def test_a_token_that_the_model_lacks_is_found_before_training(flags: str, cls: type[Any]) -> None:
    model_with_tokens_beyond("<call>", "<tool>")
    write("rows.jsonl", TEXTS)
    args, model = read("--dataset", "rows.jsonl", *flags.split(), cls=cls)
    with pytest.raises(UserError) as caught:
        prepare_data(args, model)
    line = str(caught.value)
    assert "\n" not in line
    assert "rows.jsonl:8: " in line
    assert "token '<tool>' has the id 261" in line
    assert "vocab_size is 260" in line
    assert "--new_special_tokens" in line


def test_in_validation_rows_and_pairs_and_by_megatron_data() -> None:
    model_with_tokens_beyond("<tool>")
    write("good.jsonl", ["yes"] * 3)
    write("rows.jsonl", TEXTS)
    args, model = read("--dataset", "good.jsonl", "--val_dataset", "rows.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl:8: token '<tool>' has the id 260"):
        prepare_data(args, model)
    args, model = read("--dataset", "rows.jsonl", cls=RlhfArguments)
    with pytest.raises(UserError, match=r"rows\.jsonl:8: token '<tool>' has the id 260"):
        prepare_pairs(args, model)
    with pytest.raises(UserError, match=r"rows\.jsonl:8: token '<tool>' has the id 260"):
        inspect(["--model", "model", "--dataset", "rows.jsonl", "--inspect", "true"])


def test_the_remedies_help() -> None:
    model_with_tokens_beyond("<tool>")
    write("rows.jsonl", TEXTS)
    args, model = read("--dataset", "rows.jsonl", "--new_special_tokens", "<tool>")
    data = prepare_data(args, model)
    assert model.megatron_args["vocab_size"] == 384
    assert max(max(row["input_ids"]) for row in data.train) == 260
    write("other.jsonl", ["yes"] * 5)  # the tokens need not occur
    for flags in ([], ["--lazy_tokenize", "true"], ["--streaming", "true"]):
        args, model = read("--dataset", "other.jsonl", *flags)
        prepare_data(args, model)


def test_a_row_that_is_dropped_or_cut_is_no_reason_to_stop() -> None:
    model_with_tokens_beyond("<tool>")
    write("rows.jsonl", ["yes", "no", "x" * 200 + "<tool>"])
    for strategy, rows in (("delete", 2), ("right", 3)):
        flags = ["--max_length", "100", "--truncation_strategy", strategy]
        args, model = read("--dataset", "rows.jsonl", *flags)
        assert len(prepare_data(args, model).train) == rows


@pytest.mark.parametrize(
    ("pad", "eos", "expected"),
    [(None, None, 0), (None, "<|im_end|>", 2), ("<beyond>", None, 0), ("<|im_end|>", None, 2)],
)
def test_rows_are_padded_by_a_token_of_the_model(
    pad: str | None, eos: str | None, expected: int
) -> None:
    folder = model_with_tokens_beyond("<beyond>")
    edit(folder, "tokenizer_config.json", pad_token=pad, eos_token=eos)
    write("rows.jsonl", ["yes", "a longer answer"])
    for flags in (["--padding_free", "false"], ["--padding_free", "true"]):
        args, model = read("--dataset", "rows.jsonl", *flags)
        data = prepare_data(args, model)
        data.collate.pad_to_multiple_of = 64
        batch = data.collate([data.train[0], data.train[1]])
        padded = batch["input_ids"][batch["samples"] == 0]
        assert padded.numel()
        assert padded.unique().tolist() == [expected]


def test_rows_that_fill_no_batch_are_said_to_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    save_model(Path("model"), "llama")
    write("rows.jsonl", [f"answer {index}" for index in range(7)])
    line = ["--model", "model", "--dataset", "rows.jsonl", "--global_batch_size", "4"]
    for flags, said in (
        ("--max_epochs 3", "7 rows make 5 steps of 4; the last 1 fill no global batch"),
        ("--max_epochs 4", None),
        ("--max_epochs 3 --train_iters 2", None),
        ("--max_epochs 3 --train_iters 5", "the last 1 fill"),
    ):
        caplog.clear()
        args, _, model = read_training_arguments(
            SftArguments, [*line, *flags.split()], "megatron sft"
        )
        with caplog.at_level("INFO"):
            prepare_data(args, model)
        assert ("left out" in caplog.text) == (said is not None)
        assert (said or "") in caplog.text


def test_flags_without_effect_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    save_model(Path("model"), "llama")
    write("rows.jsonl", TEXTS)
    args, model = read("--dataset", "rows.jsonl")
    plain = [row["input_ids"].tolist() for row in prepare_data(args, model).train]
    for name, value in (
        ("packing_cache", "somewhere"),
        ("padding_side", "left"),
        ("response_prefix", "<think>"),
    ):
        with caplog.at_level("INFO"):
            args, model = read("--dataset", "rows.jsonl", f"--{name}", value)
        assert f"--{name} {value}: " in caplog.text
        assert [row["input_ids"].tolist() for row in prepare_data(args, model).train] == plain
    caplog.clear()
    empty = ["packing_cache", "response_prefix", "template", "agent_template", "cached_dataset"]
    args, model = read("--dataset", "rows.jsonl", *(w for n in empty for w in (f"--{n}", "")))
    assert [row["input_ids"].tolist() for row in prepare_data(args, model).train] == plain


@pytest.mark.parametrize("kind", ["single", "cyclic"])
def test_the_order_of_a_single_pass(kind: str) -> None:
    save_model(Path("model"), "llama")
    write("rows.jsonl", [f"answer {index}" for index in range(6)])
    args, model = read("--dataset", "rows.jsonl", "--dataloader_type", kind)
    data = prepare_data(args, model)
    shared = {"micro_batch_size": 1, "global_batch_size": 1, "dp_rank": 0, "dp_size": 1}
    state = SimpleNamespace(consumed_train_samples=0)
    batches = [batch for batch, _ in zip(data.batches(state, shared), range(12), strict=False)]
    order = [batch["input_ids"][0].tolist() for batch in batches]
    in_order = [row["input_ids"].tolist() for row in data.train]
    assert (order[:6] == order[6:] == in_order) == (kind == "single")
    assert sorted(order[6:]) == sorted(in_order)


def test_an_external_order_is_that_of_a_stream() -> None:
    save_model(Path("model"), "llama")
    write("rows.jsonl", ["yes"] * 3)
    args, model = read("--dataset", "rows.jsonl", "--streaming", "true",
                       "--dataloader_type", "external")  # fmt: skip
    check_training(args, model)
    prepare_data(args, model)
    args, model = read("--dataset", "rows.jsonl", "--dataloader_type", "external")
    with pytest.raises(UserError, match="--dataloader_type external needs --streaming true"):
        check_training(args, model)


def test_packs_without_a_length_are_as_long_as_the_model_allows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_model(Path("model"), "llama")
    write("rows.jsonl", ["yes"] * 30)
    with caplog.at_level("INFO"):
        args, model = read("--dataset", "rows.jsonl", "--packing", "true")
        check_training(args, model)
        data = prepare_data(args, model)
    assert "packs are of 512 tokens" in caplog.text
    assert len(data.train) < 30
