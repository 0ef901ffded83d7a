"""`--dry_run true` as a command: full-size models in seconds, nothing written, no GPU needed."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import SECONDS, Case, check_message, run_together, snapshot, words
from tests.planning.models import PUBLISHED, save_config
from tests.tiny import save_model


def dry_run(scratch: Path, folder: Path, environ: dict[str, str], **flags: Any) -> str:
    """What a dry run in `folder` prints."""
    command = words("megatron sft", {"dry_run": "true", "max_length": 4096}, flags)
    case = Case("dry", command, "", environ, late=True)
    before = snapshot(folder)
    ((code, error),) = run_together([case], folder, scratch)
    assert code == 0, error
    assert snapshot(folder) == before
    return (scratch / "0.out").read_text()


def peaks(text: str) -> list[float]:
    """The last column of the table."""
    rows = re.findall(r"^ *\d+  .*?([\d.]+)$", text, re.MULTILINE)
    return [float(row) for row in rows]


LARGE = [
    (
        "Qwen3-235B-A22B",
        {"NPROC_PER_NODE": "8"},
        {
            "tensor_model_parallel_size": 4,
            "sequence_parallel": "true",
            "pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 4,
            "expert_tensor_parallel_size": 1,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        ("235,093,634,560 parameters", "8 processes = TP 4 x PP 2 x CP 1 x DP 1; experts: EP 4"),
    ),
    (
        "DeepSeek-V3",
        {"NPROC_PER_NODE": "8", "NNODES": "128"},
        {
            "global_batch_size": 8192,
            "pipeline_model_parallel_size": 16,
            "decoder_last_pipeline_num_layers": 1,
            "expert_model_parallel_size": 64,
            "train_iters": 10,
        },
        ("671,026,404,352 parameters", "1024 processes = TP 1 x PP 16", "10 = 81,920 samples"),
    ),
]


@pytest.mark.parametrize(("name", "environ", "flags", "lines"), LARGE, ids=[c[0] for c in LARGE])
def test_full_size_models(
    name: str, environ: dict[str, str], flags: dict[str, Any], lines: list[str], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    save_config(tmp_path / "in" / name, PUBLISHED[name])
    started = time.monotonic()
    text = dry_run(tmp_path, tmp_path / "in", environ, model=name, **flags)
    assert time.monotonic() - started < 2 * SECONDS
    for line in lines:
        assert line in text
    assert len(peaks(text)) == flags["pipeline_model_parallel_size"]


def test_it_plans_for_gpus(tmp_path: Path) -> None:
    """Flags and dtypes that this machine could not train with."""
    (tmp_path / "in").mkdir()
    save_config(tmp_path / "in" / "model", PUBLISHED["Qwen2.5-1.5B"])
    flags = {"model": "model", "micro_batch_size": 2, "global_batch_size": 8}
    text = dry_run(tmp_path, tmp_path / "in", {}, **flags, use_precision_aware_optimizer="true",
                   exp_avg_dtype="bf16", fp8_format="hybrid")  # fmt: skip
    assert "1,543,714,304 parameters" in text
    assert re.search(r"^torch_dtype +bfloat16 +config.json$", text, re.MULTILINE)
    assert 45 < peaks(text)[0] < 60


def test_it_counts_what_is_trained(tmp_path: Path) -> None:
    """A rank's adapters alone take gradients and optimizer states."""
    (tmp_path / "in").mkdir()
    save_config(tmp_path / "in" / "model", PUBLISHED["Qwen2.5-1.5B"])
    flags = {"model": "model", "train_type": "lora", "target_modules": "linear_qkv"}
    layout = {"pipeline_model_parallel_size": 2}
    text = dry_run(tmp_path, tmp_path / "in", {"NPROC_PER_NODE": "2"}, **flags, **layout)
    adapters = 14 * 8 * (1536 + 2048)
    assert text.count(f"  {adapters:,}  ") == 2


def test_it_counts_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save_model(folder / "llama", "llama")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]
    (folder / "rows.jsonl").write_text(20 * (json.dumps({"messages": turns}) + "\n"))
    flags = {"model": "llama", "dataset": "rows.jsonl", "global_batch_size": 4, "max_epochs": 2}
    text = dry_run(tmp_path, folder, {"NPROC_PER_NODE": "2"}, **flags, max_length=None)
    assert "steps   10 = 40 samples = 2.00 epochs of 20 rows" in text
    assert "4 samples a step = micro-batches of 1 x 2 data-parallel ranks x 2 accumulation" in text


def test_it_finds_what_training_would_find(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save_model(folder / "llama", "llama")
    shutil.copytree(folder / "llama", folder / "cut")
    (folder / "cut" / "model.safetensors").write_bytes(b"cut")
    plan = {"dry_run": "true", "model": "llama", "max_length": 64}
    cases = [
        Case("heads", words("megatron sft", plan, {"tensor_model_parallel_size": 4}),
             "4 does not divide the model's num_attention_heads=6", {"NPROC_PER_NODE": "8"}),
        Case("world", words("megatron sft", plan, {"pipeline_model_parallel_size": 2}),
             "1 process cannot be split"),
        Case("weights", words("megatron pt", plan, {"model": "cut"}), "safetensors cannot be read"),
        Case("rows", words("megatron sft", plan, {"dataset": "no.jsonl"}), "no.jsonl: there is no"),
        Case("count", words("megatron sft", plan, {}), "NNODES='x' must be", {"NNODES": "x"}),
    ]  # fmt: skip
    for case, (code, text) in zip(cases, run_together(cases, folder, tmp_path), strict=True):
        assert code == 1, text
        check_message(text, case.expected)
    assert sorted(os.listdir(folder)) == ["cut", "llama"]
