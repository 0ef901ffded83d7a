"""The commands of Megatron-SWIFT's guide, with local models and data sets, run as they stand.

Only ids, the sizes of samples drawn (`#500`) and paths differ; pre-training over 5000 steps also
gets an `--exit_interval`, and a `--tensorboard_dir` of its own. Ranks are forked here instead of
launched, which tests/cli/test_launch.py covers.
"""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.tiny import save_model

TO_MCORE = """
swift export
    --model {model}
    --to_mcore true
    --torch_dtype bfloat16
    --output_dir {model}-mcore
    --test_convert_precision true
"""

SFT = """
megatron sft
    --load {model}-mcore
    --dataset 'zh.jsonl#16' 'en.jsonl#16' 'self-cognition#16'
    --tensor_model_parallel_size 2
    --sequence_parallel true
    --micro_batch_size 16
    --global_batch_size 16
    --recompute_granularity full
    --recompute_method uniform
    --recompute_num_layers 1
    --finetune true
    --cross_entropy_loss_fusion true
    --lr 1e-5
    --lr_warmup_fraction 0.05
    --min_lr 1e-6
    --max_epochs 1
    --save megatron_output/{model}
    --save_interval 100
    --max_length 2048
    --system 'You are a helpful assistant.'
    --num_workers 4
    --no_save_optim true
    --no_save_rng true
    --dataset_num_proc 4
    --model_author swift
    --model_name swift-robot
"""

LORA = (
    SFT.replace("--lr 1e-5", "--lr 1e-4")
    + """
    --train_type lora
    --lora_rank 8
    --lora_alpha 32
    --target_modules all-linear
"""
)

PT = """
megatron pt
    --load {model}-mcore
    --dataset text.jsonl
    --streaming true
    --packing true
    --tensor_model_parallel_size 2
    --sequence_parallel true
    --micro_batch_size 1
    --global_batch_size 16
    --recompute_granularity full
    --recompute_method uniform
    --recompute_num_layers 1
    --train_iters 5000
    --eval_iters 100
    --finetune true
    --cross_entropy_loss_fusion true
    --lr 1e-5
    --lr_warmup_iters 300
    --min_lr 1e-6
    --save megatron_output/{model}-pt
    --eval_interval 500
    --save_interval 500
    --max_length 8192
    --num_workers 1
    --no_save_optim true
    --no_save_rng true
    --dataset_num_proc 4
    --exit_interval 1
    --tensorboard_dir boards
"""

TO_HF = """
swift export
    --mcore_model {run}
    --to_hf true
    --torch_dtype bfloat16
    --output_dir {run}-hf
    --test_convert_precision true
"""

ADAPTERS_TO_HF = TO_HF.replace("--mcore_model", "--mcore_adapters")

DPO = """
megatron rlhf
    --rlhf_type dpo
    --load {model}-mcore
    --dataset pairs.jsonl
    --max_epochs 1
    --beta 0.1
    --rpo_alpha 1
    --loss_type sigmoid
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads two ranks can share, chats and texts."""
    folder = tmp_path_factory.mktemp("guide")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    save_model(folder / "Qwen2.5", "qwen2", torch.bfloat16, **heads)
    for name in ("zh", "en"):
        rows = [{"instruction": f"{name} {i}?", "input": "", "output": f"{i}."} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"query": f"{i}?", "response": f"{i}, yes.", "rejected_response": f"no, {i + 1}."}
        for i in range(20)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    texts = [{"text": f"chapter {i} " + "and so on " * 150} for i in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def run_here(folder: Path, line: str) -> int:
    """One rank of a command; its exit code."""
    from swiftmeg.cli.main import run

    os.chdir(folder)
    os.environ["SWIFTMEG_CACHE"] = str(folder / "cache")
    program, *argv = shlex.split(line)
    return run(program, argv)


def run_command(folder: Path, command: str, ranks: int = 1, **names: object) -> None:
    line = command.format(model="Qwen2.5", **names)
    assert run_ranks(ranks, run_here, folder, line) == [0] * ranks


def newest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: int(path.name[1:].split("-")[0]))


def test_the_guide_from_end_to_end(work: Path) -> None:
    run_command(work, TO_MCORE)
    run_command(work, SFT, ranks=2)
    full = newest(work / "megatron_output" / "Qwen2.5")
    assert (full / "latest_checkpointed_iteration.txt").read_text() == "3"
    run_command(work, TO_HF, run=full)
    run_command(work, LORA, ranks=2)
    lora = newest(work / "megatron_output" / "Qwen2.5")
    assert lora != full
    run_command(work, ADAPTERS_TO_HF, run=lora)
    before = load_file(work / "Qwen2.5" / "model.safetensors")
    for run in (full, lora):
        after = load_file(Path(f"{run}-hf") / "model.safetensors")
        assert set(after) == set(before)
        name = "model.layers.1.self_attn.q_proj.weight"
        assert not after[name].equal(before[name].to(after[name].dtype))


def test_pre_training_on_a_stream(work: Path) -> None:
    if not (work / "Qwen2.5-mcore").is_dir():
        run_command(work, TO_MCORE)
    run_command(work, PT, ranks=2)
    run = newest(work / "megatron_output" / "Qwen2.5-pt")
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert list((work / "boards").glob("events.out.tfevents.*"))
    assert not (run / "runs").exists()


def test_preference_training(work: Path) -> None:
    if not (work / "Qwen2.5-mcore").is_dir():
        run_command(work, TO_MCORE)
    run_command(work, DPO)
    run = newest(work / "megatron_output" / "Qwen2.5")
    first, *_ = map(json.loads, (run / "logging.jsonl").read_text().splitlines())
    assert first["rewards/margins"] == pytest.approx(0, abs=0.05)  # the reference is the start
    assert first["loss"] == pytest.approx(0.693 + first["nll_loss"], rel=0.01)
    assert first["consumed_samples"] == 16
