"""Measure `swift export` in both directions: host memory, and time against copying the files.

    python benchmarks/conversion.py --output bench-conversion

makes a Qwen3-MoE checkpoint of about 4 GB with random bf16 weights in 1 GB files, converts it to
Megatron and back in one process each, compares the bytes, and prints one line a step. Each
conversion is timed against a copy made just before it. Memory is that of all processes of the
command, the most that was seen at once. Times end when the disk has everything.

`--processes 1 4` goes to Megatron in one process and back in four with tensor parallelism 4;
what the processes read is printed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

SIZES = {
    "vocab_size": 65536,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 19,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
}
FILE_BYTES = 10**9


def shapes(config: Qwen3MoeConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor as published."""
    hidden, expert = config.hidden_size, config.moe_intermediate_size
    queries, keys = config.num_attention_heads * 64, config.num_key_value_heads * 64
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "lm_head.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        found |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (queries, hidden),
            prefix + "self_attn.k_proj.weight": (keys, hidden),
            prefix + "self_attn.v_proj.weight": (keys, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, queries),
            prefix + "self_attn.q_norm.weight": (64,),
            prefix + "self_attn.k_norm.weight": (64,),
            prefix + "mlp.gate.weight": (config.num_experts, hidden),
        }
        for number in range(config.num_experts):
            name = prefix + f"mlp.experts.{number}."
            found |= {
                name + "gate_proj.weight": (expert, hidden),
                name + "up_proj.weight": (expert, hidden),
                name + "down_proj.weight": (hidden, expert),
            }
    return found


def make(folder: Path) -> None:
    """Write the checkpoint."""
    config = Qwen3MoeConfig(**SIZES, architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    torch.manual_seed(0)
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes(config).items():
        if sum(tensor.nbytes for tensor in files[-1].values()) > FILE_BYTES:
            files.append({})
        files[-1][name] = torch.randn(shape, dtype=torch.bfloat16)
    places = {}
    for number, content in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(content, folder / file, {"format": "pt"})
        places |= dict.fromkeys(content, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def resident(session: int) -> tuple[int, int]:
    """Bytes in memory of a session's processes: those that no file backs, and all."""
    anonymous = total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
            stat = (status.parent / "stat").read_text()
        except OSError:
            continue
        if int(stat.rsplit(")", 1)[1].split()[3]) == session:
            sizes = dict(re.findall(r"Rss(Anon|Shmem|File):\s+(\d+) kB", text))
            kinds = {kind: 1024 * int(size) for kind, size in sizes.items()}
            total += sum(kinds.values())
            anonymous += sum(kinds.values()) - kinds.get("File", 0)
    return anonymous, total


def watch(name: str, command: list[str], processes: int) -> float:
    """Run a command; print its peak memory and what it reads, and return its seconds."""
    start, peak, most = time.perf_counter(), 0, 0
    with (Path(command[-1]).parent / f"{name.replace(' ', '-')}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | ({"NPROC_PER_NODE": str(processes)} if processes > 1 else {}),
        )
        while process.poll() is None:
            anonymous, total = resident(process.pid)
            peak, most = max(peak, anonymous), max(most, total)
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{name} failed, see {log.name}")
    os.sync()
    took = time.perf_counter() - start
    print(
        f"{name}: {took:.1f} s, {most / 2**30:.2f} GiB in memory, "
        f"{peak / 2**30:.2f} GiB of it backed by no file",
        flush=True,
    )
    lines = Path(log.name).read_text().splitlines()
    print(*(f"{name}: {line}" for line in lines if line.startswith("read ")), flush=True)
    return took


def copy(folder: Path, target: Path) -> float:
    """Copy a folder's files; print and return the seconds."""
    os.sync()
    start = time.perf_counter()
    shutil.copytree(folder, target)
    os.sync()
    took = time.perf_counter() - start
    print(f"copy: {took:.1f} s", flush=True)
    shutil.rmtree(target)
    return took


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors."""
    found = []
    for folder in (one, other):
        files = [safe_open(file, framework="pt") for file in folder.glob("*.safetensors")]
        found.append({name: file for file in files for name in file.keys()})  # noqa: SIM118
    ours, theirs = found
    return ours.keys() == theirs.keys() and all(
        torch.equal(file.get_tensor(name), theirs[name].get_tensor(name))
        for name, file in ours.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs=2, default=(1, 1), help="there and back")
    options = parser.parse_args()
    folder = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model, mcore, back = folder / "model", folder / "mcore", folder / "back"
    if not model.exists():
        make(model)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB", flush=True)
    for target in (mcore, back):
        shutil.rmtree(target, ignore_errors=True)
    export = [sys.executable, "-m", "swiftmeg.cli.main", "swift", "export", "--model", str(model)]
    steps = {
        "to mcore": ["--to_mcore", "true", "--output_dir", str(mcore)],
        "to hf": ["--to_hf", "true", "--mcore_model", str(mcore), "--output_dir", str(back)],
    }
    for (name, flags), processes in zip(steps.items(), options.processes, strict=True):
        copied = copy(model, folder / "copy")
        layout = ["--tensor_model_parallel_size", str(processes)]
        took = watch(name, [*export, *layout, *flags], processes)
        print(f"{name}: {took / copied:.2f} times the copy", flush=True)
    print("the same bytes" if same(model, back) else "NOT THE SAME", flush=True)


if __name__ == "__main__":
    main()
