"""megatron data: what it prints and draws."""

import json
from pathlib import Path

import pytest

from swiftmeg.cli.main import run
from swiftmeg.data.encoded.inspection import marked_text
from swiftmeg.data.encoded.tokens import TokenDataset
from swiftmeg.data.template.template import IGNORE
from tests.tiny import save_model


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWIFTMEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", "qwen3", num_hidden_layers=1)
    lines = []
    for i in range(40):
        ask = {"role": "user", "content": f"question {i}"}
        answer = {"role": "assistant", "content": "yes " * (i % 7 + 1)}
        lines.append("bad" if i % 10 == 3 else json.dumps({"messages": [ask, answer]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_inspection_shows_what_is_trained(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "data --model model --dataset rows.jsonl --inspect --inspect_samples 2 --max_length 300"
    assert run("megatron", [*flags.split(), "--dataset_shuffle", "false", "--packing"]) == 0
    out, log = capsys.readouterr()
    assert "rows.jsonl: 40 rows read, 36 kept, 4 dropped: 4 x not JSON (first: rows.jsonl:4" in log
    assert "<|im_start|>assistant\n⟦yes <|im_end|>⟧" in out
    assert "<|im_start|>assistant\n⟦yes yes <|im_end|>⟧" in out
    assert out.count("--- row") == 2
    lines = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert lines["rows"].startswith("36; tokens")
    assert "% of all" in lines["trained"]
    assert "packs, filled to" in lines["packed to 300 tokens"]
    assert (work / "data_lengths.png").read_bytes()[:4] == b"\x89PNG"
    # What was printed is what training reads.
    (file,) = work.glob("cache/encoded/*/tokens.bin")
    rows = list(TokenDataset(file.parent))
    tokens = sum(row["length"] for row in rows)
    trained = sum(int((row["labels"] != IGNORE).sum()) for row in rows)
    assert lines["rows"] == f"36; tokens: {tokens:,}"
    assert lines["trained"].startswith(f"{trained:,} tokens, {trained / tokens:.1%}")


def test_pairs_are_shown_with_both_sides(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"query": f"q {k}", "response": "yes", "rejected_response": "no" if k % 4 else "yes"}
        for k in range(12)
    ]
    (work / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = "data --model model --dataset pairs.jsonl --rlhf_type dpo --inspect --inspect_samples 1"
    assert run("megatron", flags.split()) == 0
    out, log = capsys.readouterr()
    assert "12 rows: 9 kept, 3 dropped: 3 x the rejected answer equals the chosen one" in log
    assert out.index("--- pair 1, chosen: ") < out.index("⟦yes<|im_end|>⟧")
    assert out.index("--- pair 1, rejected: ") < out.index("⟦no<|im_end|>⟧")
    assert "pairs: 9, of two rows each\nrows: 18; tokens: " in out
    # Training takes the chosen answers of such rows.
    assert run("megatron", flags.replace(" --rlhf_type dpo", "").split()) == 0
    out = capsys.readouterr().out
    assert "rows: 12; tokens" in out
    assert "no<|im_end|>" not in out


def test_without_inspection_rows_are_prepared(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "data --model model --dataset rows.jsonl --split_dataset_ratio 0.25"
    assert run("megatron", flags.split()) == 0
    out = capsys.readouterr().out
    assert "--- row" not in out
    assert "validation rows: 9" in out
    assert not (work / "data_lengths.png").exists()
    assert len(list(work.glob("cache/encoded/*/tokens.bin"))) == 2


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--dataset rows.jsonl --streaming --train_iters 1", "by #N behind a dataset's name"),
        (
            "--dataset rows.jsonl --inspect --inspect_output rows.jsonl/x.png",
            "rows.jsonl is a file",
        ),
        ("", "--dataset is needed"),
    ],
)
def test_bad_input(work: Path, capsys: pytest.CaptureFixture[str], flags: str, line: str) -> None:
    assert run("megatron", ["data", "--model", "model", *flags.split()]) == 1
    assert line in capsys.readouterr().err


def test_trained_tokens_are_coloured() -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    row: dict[str, list[float]] = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, -100]}
    green = "\x1b[1;32m2 3\x1b[0m"
    assert marked_text(Words(), row, True) == f"\x1b[2m1\x1b[0m{green}\x1b[2m4\x1b[0m"
    assert marked_text(Words(), row, False) == "1⟦2 3⟧4"
    row["loss_scale"] = [0.0, 1.0, 2.0, 0.0]
    assert marked_text(Words(), row, False) == "1⟦2⟧⟦3⟧\u00d724"
