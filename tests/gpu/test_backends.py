"""On a GPU: both layer backends train like transformers, and read each other's checkpoints."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import save_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
BACKENDS = [
    "native",
    pytest.param(
        "transformer_engine",
        marks=pytest.mark.skipif(not HAS_TE, reason="TransformerEngine is not installed"),
    ),
]
# head sizes that cuDNN's fused attention takes
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip

DELTA_NET = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32,
             "linear_value_head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
             "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}  # fmt: skip


def command(program: str, *words: Any) -> str:
    """Run a command in a process of its own; returns what it printed."""
    start = f"from swiftmeg.cli.main import {program}; {program}()"
    job = [sys.executable, "-c", start, *(str(word) for word in words)]
    done = subprocess.run(job, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    save_model(folder / "qwen3", "qwen3", dtype=torch.bfloat16, **SIZES)
    save_model(folder / "qwen3_next", "qwen3_next", dtype=torch.bfloat16, **SIZES | DELTA_NET)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {i} " + "x" * (7 * i % 40)},
                {"role": "assistant", "content": "yes " * (1 + 5 * i % 13)},
            ]
        }
        for i in range(16)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def train(
    work: Path, backend: str, name: str, *flags: Any, model: str = "qwen3"
) -> list[dict[str, Any]]:
    folder = work / f"{backend}-{name}"
    command(
        "megatron", "sft", "--model", work / model, "--dataset", work / "rows.jsonl",
        "--micro_batch_size", 4, "--global_batch_size", 16, "--lr", 1e-3,
        "--log_interval", 1, "--num_workers", 0, "--save", folder, "--add_version", "false",
        "--transformer_impl", backend,
        *(() if "--train_iters" in flags else ("--train_iters", 5)), *flags,
    )  # fmt: skip
    return [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]


def transformers_loss(work: Path, name: str = "qwen3") -> float:
    """Loss of the untrained model over all rows, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swiftmeg.data.template.template import Template

    model = AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32).cuda()
    template = Template(AutoTokenizer.from_pretrained(work / name))
    total, count = 0.0, 0
    for line in (work / "rows.jsonl").read_text().splitlines():
        encoded = template.encode(json.loads(line))
        ids = torch.tensor([encoded["input_ids"]]).cuda()
        labels = torch.tensor(encoded["labels"][1:]).cuda()
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("padding_free", ["true", "false"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_training_starts_at_transformers_loss(
    work: Path, backend: str, padding_free: str
) -> None:
    lines = train(work, backend, f"padding-free-{padding_free}", "--padding_free", padding_free)
    expected = transformers_loss(work)
    assert abs(lines[0]["lm loss"] - expected) <= 1e-2 * expected
    assert lines[-1]["lm loss"] < 0.9 * lines[0]["lm loss"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_delta_nets_start_at_transformers_loss(work: Path, backend: str) -> None:
    lines = train(work, backend, "delta-net", model="qwen3_next")
    expected = transformers_loss(work, "qwen3_next")
    assert abs(lines[0]["lm loss"] - expected) <= 1e-2 * expected
    assert lines[-1]["lm loss"] < 0.9 * lines[0]["lm loss"]


@pytest.mark.parametrize("in_background", ["false", "true"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_exports_and_resumes(work: Path, backend: str, in_background: str) -> None:
    name = f"saved-{in_background}"
    train(work, backend, name, "--save_interval", 3, "--async_save", in_background)
    saved = work / f"{backend}-{name}"
    printed = command(
        "swift", "export", "--mcore_model", saved, "--to_hf", "true", "--exist_ok", "true",
        "--output_dir", work / f"{backend}-hf", "--test_convert_precision", "true",
    )  # fmt: skip
    assert "next token agrees" in printed
    resumed = train(work, backend, f"resumed-{name}", "--load", saved, "--train_iters", 6)
    assert [line["global_step/max_steps"] for line in resumed] == ["6/6"]


@pytest.mark.skipif(not HAS_TE, reason="TransformerEngine is not installed")
def test_backends_read_each_others_checkpoints(work: Path) -> None:
    for backend in ("native", "transformer_engine"):
        train(work, backend, "exchange")
    start = {}
    for writer, reader in (("native", "transformer_engine"), ("transformer_engine", "native")):
        flags = ("--load", work / f"{writer}-exchange", "--finetune", "true", "--train_iters", 1)
        start[writer] = train(work, reader, f"reads-{writer}", *flags)[0]["lm loss"]
        same = train(work, writer, f"reads-own-{writer}", *flags)[0]["lm loss"]
        assert abs(start[writer] - same) <= 1e-2 * same
