"""swift infer from the command line: the chat, the dataset mode, and refusals."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from swiftmeg.cli import infer
from swiftmeg.errors import UserError
from swiftmeg.inference.chat import RULE

RUN = ["--temperature", "0", "--max_new_tokens", "8"]


def _chat(folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    infer.main(["--model", str(folder), *RUN, *flags])


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in row["messages"][:-1]]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_chat_keeps_the_conversation_until_it_is_cleared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, stream: str
):
    out = tmp_path / "answers.jsonl"
    lines = "one\n\ntool:42\nclear\ntwo\nreset-system\nBe brief.\nthree\nQUIT\nnever\n"
    _chat(folder, lines, monkeypatch, "--stream", stream, "--result_path", str(out))
    rows = _read(out)
    first = rows[0]["response"]
    assert [_said(row) for row in rows] == [
        [("user", "one")],
        [("user", "one"), ("assistant", first), ("tool", "42")],
        [("user", "two")],
        [("system", "Be brief."), ("user", "three")],
    ]
    assert all(row["messages"][-1]["content"] == row["response"] for row in rows)
    shown = capsys.readouterr().out
    assert f"<<< one\n{first}\n{RULE}\n" in shown
    assert shown.count(RULE) == 4


def test_chat_reads_queries_of_several_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "answers.jsonl"
    lines = "multi-line\na\nb #\nclear\nsingle-line\nc #\n"
    _chat(folder, lines, monkeypatch, "--result_path", str(out))
    assert [_said(row)[-1] for row in _read(out)] == [("user", "a\nb "), ("user", "c #")]


def test_too_long_query_is_refused_and_forgotten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    out = tmp_path / "answers.jsonl"
    _chat(folder, "x" * 200 + "\nhi\n", monkeypatch, "--result_path", str(out))
    assert "longer than the model's context of 128 tokens" in capsys.readouterr().out
    assert [_said(row) for row in _read(out)] == [[("user", "hi")]]


def test_args_json_gives_template_and_system_but_no_dataset(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved = {"system": "Saved.", "template": None, "val_dataset": ["gone.jsonl"], "model": "gone"}
    args_file = folder / "args.json"
    args_file.write_text(json.dumps(saved))
    seen: list[str | None] = []
    try:
        from swiftmeg.inference import chat

        monkeypatch.setattr(chat, "chat", lambda engine, *_, **__: seen.append(_system(engine)))
        for flags in ((), ("--system", "Typed."), ("--load_args", "false")):
            _chat(folder, "", monkeypatch, "--result_path", str(tmp_path / "x"), *flags)
    finally:
        args_file.unlink()
    assert seen == ["Saved.", "Typed.", None]


def _system(engine: Any) -> str | None:
    return engine.template.system


def test_dataset_rows_are_answered_in_order(folder: Path, tmp_path: Path, capsys: Any):
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    queries = ["hi", "a longer question", "x" * 200, "last"]
    data.write_text("".join(json.dumps({"query": q, "response": "yes"}) + "\n" for q in queries))
    flags = ["--model", str(folder), *RUN, "--val_dataset", str(data)]
    infer.main([*flags, "--result_path", str(out), "--max_batch_size", "2", "--metric", "acc"])
    rows = _read(out)
    assert [_said(row) for row in rows] == [[("user", q)] for q in ("hi", queries[1], "last")]
    assert [row["labels"] for row in rows] == ["yes"] * 3
    shown = capsys.readouterr().out
    assert f"3 rows answered, 1 dropped: {out}" in shown
    assert "acc: 0.0000 (0 of 3)" in shown

    # Their own answers as labels, one at a time and streamed: all right.
    again, second = tmp_path / "again.jsonl", tmp_path / "second.jsonl"
    answered = [{"query": _said(row)[0][1], "response": row["response"]} for row in rows]
    again.write_text("".join(json.dumps(row) + "\n" for row in answered))
    flags = ["--model", str(folder), *RUN, "--val_dataset", str(again), "--stream", "true"]
    infer.main([*flags, "--metric", "acc", "--result_path", str(second)])
    assert "acc: 1.0000 (3 of 3)" in capsys.readouterr().out


def test_sample_answers_the_first_rows(folder: Path, tmp_path: Path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(folder), *RUN, "--val_dataset", str(data)]
    infer.main([*flags, "--result_path", str(out), "--val_dataset_sample", "2"])
    assert [_said(row)[0][1] for row in _read(out)] == ["0", "1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model is required"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--model", "M", "--adapters", "a"], "--adapters a: there is no adapter_config.json"),
        (["--model", "M", "--infer_backend", "vllm"], "vllm"),
        (["--model", "M", "--temperature", "-1"], "--temperature -1.0 must be at least 0"),
        (["--model", "M", "--top_p", "2"], "--top_p 2.0 must be above 0 and at most 1"),
        (["--model", "M", "--max_new_tokens", "0"], "--max_new_tokens 0 must be at least 1"),
        (["--model", "M", "--stream", "true", "--num_beams", "2"], "choose one"),
        (["--model", "M", "--metric", "acc"], "--metric acc needs --val_dataset"),
        (["--model", "M", "--max_batch_size", "2"], "--max_batch_size 2 needs --val_dataset"),
        (["--model", "M", "--val_dataset", "/no/rows.jsonl"], "/no/rows.jsonl"),
        (["--model", "M", "--template", "nonsense"], "--template nonsense: unknown"),
        (["--model", "M", "--result_path", "/proc/x/y"], "--result_path /proc/x/y: cannot be"),
        (["--model", "M", "--dataset", "x"], "unknown flag --dataset"),
    ],
)
def test_bad_flags_are_one_clear_error(folder: Path, flags: list[str], message: str):
    with pytest.raises(UserError) as error:
        infer.main([str(folder) if flag == "M" else flag for flag in flags])
    assert message in str(error.value)


def test_datasets_are_registered_by_files(folder: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"poem": "why", "answer": "so"}) + "\n")
    entry = {"dataset_path": "rows.jsonl", "dataset_name": "mine", "columns": {"poem": "query"}}
    (tmp_path / "info.json").write_text(json.dumps([entry]))
    (tmp_path / "plugin.py").write_text(
        "from pathlib import Path\n"
        "from swiftmeg.data.sources.registry import DatasetInfo, Subset, register_dataset\n"
        "loud = Subset(preprocess=lambda row: {'query': row['poem'].upper()})\n"
        "path = Path(__file__).with_name('rows.jsonl')\n"
        "info = DatasetInfo(path=path, subsets={'default': loud})\n"
        "register_dataset(info, name='loud')\n"
    )
    out = tmp_path / "out.jsonl"
    flags = ["--model", str(folder), *RUN, "--result_path", str(out), "--val_dataset", "mine"]
    plugins = ["--custom_register_path", str(tmp_path / "plugin.py")]
    info = ["--custom_dataset_info", str(tmp_path / "info.json")]
    infer.main([*flags, "loud", *plugins, *info])
    assert [_said(row) for row in _read(out)] == [[("user", "why")], [("user", "WHY")]]
    with pytest.raises(UserError, match=r"--external_plugins .*/gone.py: not a Python file"):
        infer.main([*flags, "--external_plugins", str(tmp_path / "gone.py")])


def test_questions_need_no_response(folder: Path, tmp_path: Path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    asked = [{"query": "hi"}, {"instruction": "say", "input": "yes"}, {"query": "a", "system": "S"}]
    asked.append({"query": "and?", "history": [["hi", "ho"]]})
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    infer.main(
        ["--model", str(folder), *RUN, "--val_dataset", str(data), "--result_path", str(out)]
    )
    assert [_said(row) for row in _read(out)] == [
        [("user", "hi")],
        [("user", "say\nyes")],
        [("system", "S"), ("user", "a")],
        [("user", "hi"), ("assistant", "ho"), ("user", "and?")],
    ]
    assert [row["labels"] for row in _read(out)] == [None] * 4
