"""Bad input ends in one clear line and exit code 1, soon, and with nothing written or changed."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.commands import (
    JOB_VARIABLES,
    SECONDS,
    Case,
    check_message,
    export,
    ranks,
    run_forked,
    sft,
    snapshot,
    to_hf,
    to_mcore,
)
from tests.ranks import run_ranks
from tests.tiny import save_model

UNREACHABLE = {
    "MODELSCOPE_DOMAIN": "127.0.0.1:9",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
}


CASES = [
    # The words themselves.
    Case("no-command", ["megatron"], "megatron needs a command: sft, pt"),
    Case("unknown-command", ["megatron", "sfd"], "has no command 'sfd': did you mean sft"),
    Case("other-program", ["megatron", "export"], "did you mean swift export"),
    Case("unknown-flag", sft(mirco_batch_size=1), "unknown flag --mirco_batch_size: .*--micro_b"),
    Case("no-such-flag", sft(zzzz=1), "unknown flag --zzzz: see megatron sft --help"),
    Case("stray-word", [*sft(), "false", "x"], "unexpected|unrecognized"),
    Case("wrong-type", sft(train_iters="ten"), "--train_iters.*'ten' is not a whole number"),
    Case("bad-choice", sft(lr_decay_style="cos"), "--lr_decay_style.*'cos'.*'cosine'"),
    Case("not-a-boolean", sft(packing="maybe"), "--packing.*'maybe' is not true or false"),
    Case("no-value", [*sft(lr=None), "--lr"], "--lr.*expected one argument"),
    Case("not-json", sft(columns="{a}"), "--columns.*'{a}' is not JSON"),
    Case("json-list", sft(extra_megatron_kwargs="[1]"), "extra_megatron_kwargs.*not a JSON object"),
    # The model.
    Case("no-model", sft(model=None), "--model is needed"),
    Case("model-missing", sft(model="./nowhere"), r"--model ./nowhere: no such folder"),
    Case("model-is-file", sft(model="rows.jsonl"), r"--model rows.jsonl: "),
    Case("hub-id", sft(model="owner/name"), "--model owner/name: .*ModelScope", UNREACHABLE),
    Case(
        "hf-hub-id",
        sft(model="owner/name", use_hf="true"),
        "--model owner/name: .*Hugging Face",
        UNREACHABLE,
    ),
    Case("no-config", sft(model="no-config"), "no-config: there is no config.json"),
    Case("config-cut", sft(model="config-cut"), "config-cut.*config.json.*cannot be read"),
    Case("config-list", sft(model="config-list"), "config-list.*config.json"),
    Case("gpt2", sft(model="gpt2"), "config.json names GPT2LMHeadModel; supported are .*Llama"),
    Case("new-type", sft(model="new-type"), "config.json.*brandnew"),
    Case("no-architecture", sft(model="no-architecture"), "names no architectures; supported are"),
    Case("no-heads", sft(model="bad-heads"), "config.json.*num_attention_heads"),
    Case("rope-type", sft(model="rope-type"), "rope_type 'longrope' is not supported; default"),
    Case("hidden-act", sft(model="hidden-act"), "hidden_act='gelu' is not supported"),
    Case("no-tokenizer", sft(model="no-tokenizer"), "no-tokenizer: .*tokenizer"),
    Case("tokenizer-cut", sft(model="tokenizer-cut"), "tokenizer-cut: .*tokenizer"),
    Case("fp16-on-cpu", sft(fp16="true"), "fp16 training needs a GPU"),
    Case("two-dtypes", sft(bf16="true", torch_dtype="float32"), "--bf16 true contradicts"),
    # Its weights.
    *(
        Case(f"{name}-{where}", command(model=folder), expected)
        for where, command in (("sft", sft), ("export", to_mcore))
        for name, folder, expected in (
            ("no-weights", "no-weights", r"no-weights holds no \*.safetensors"),
            ("weights-cut", "weights-cut", "weights-cut/model.safetensors cannot be read"),
            ("shard-cut", "shard-cut", "shard-cut/model-00002-of-.* cannot be read"),
            ("shard-missing", "shard-missing", "model-00002-of-.* is missing"),
            ("index-cut", "index-cut", "index.json is not a safetensors index"),
            ("tensor-missing", "tensor-missing", "missing: model.layers.1.mlp.up_proj.weight"),
            ("tensor-unknown", "tensor-unknown", "no place in .*: model.layers.1.extra.weight"),
        )
    ),
    *(
        Case(f"{name}-{where}", command(model=folder), expected, late=True)
        for where, command in (("sft", sft), ("export", to_mcore))
        for name, folder, expected in (
            ("shape", "shape", r"up_proj.weight \(83, 48\).*config.json"),
            ("vocabulary", "vocabulary", "embed_tokens.weight|embedding has 1000 rows"),
        )
    ),
    # Sizes.
    Case(
        "heads-tp", sft(tensor_model_parallel_size=3), "3 does not divide.*heads=4", ranks(3)
    ),
    Case("kv-heads-tp", to_mcore(model="kv-heads", tensor_model_parallel_size=2),
         "2 does not divide.*num_key_value_heads=3", ranks(2)),
    Case("ffn-tp", to_mcore(model="ffn", tensor_model_parallel_size=2),
         "2 does not divide.*intermediate_size=83", ranks(2)),
    Case("layers-pp", sft(pipeline_model_parallel_size=3),
         "2 layers cannot be split over --pipeline_model_parallel_size 3", ranks(3)),
    Case("world", sft(tensor_model_parallel_size=2), "1 process.* cannot be split into --tensor"),
    Case("world-3", sft(tensor_model_parallel_size=2), "3 processes cannot be split", ranks(3)),
    Case("tp-zero", sft(tensor_model_parallel_size=0), "--tensor_model_parallel_size 0: must be"),
    Case("batch", sft(global_batch_size=3, micro_batch_size=2), "--global_batch_size 3 must be a"),
    Case("batch-dp", sft(global_batch_size=3), "--global_batch_size 3 must.* x 2 data", ranks(2)),
    # Data.
    Case("no-dataset", sft(dataset=None), "--dataset is needed"),
    Case("no-dataset-value", sft(dataset=[]), "--dataset is needed"),
    Case("dataset-missing", sft(dataset="nowhere.jsonl"), "--dataset nowhere.jsonl: there is no f"),
    Case("dataset-kind", sft(dataset="rows.xml"), "--dataset rows.xml: unknown extension .xml"),
    Case("dataset-empty", sft(dataset="empty.jsonl"), "--dataset empty.jsonl: empty"),
    Case("no-assistant", sft(dataset="asked.jsonl"), "of its 2 rows.* 2 x no assistant turn"),
    Case("json-line", sft(dataset="broken.jsonl", strict="true"), "broken.jsonl:3: not JSON"),
    Case("not-an-object", sft(dataset="list.jsonl", strict="true"), "list.jsonl:2: .*object"),
    Case("not-utf8", sft(dataset="latin.jsonl"), "latin.jsonl: none of its 1 rows .*not UTF-8"),
    Case("too-long", sft(max_length=8), "no row is left.*max_length"),
    Case("few-rows", sft(train_iters=None, max_epochs=1, global_batch_size=64), "--max_epochs 1: "),
    Case("no-end", sft(train_iters=None), "--max_epochs or --train_iters is needed"),
    Case("template", sft(template="nosuch"), "--template nosuch: .*chatml"),
    Case("system-file", sft(system="nosuch.txt"), "--system nosuch.txt"),
    # Checkpoints.
    Case("load-missing", sft(load="nowhere"), "--load nowhere: no such folder"),
    Case("load-hf", sft(load="llama"), "--load llama: not a Megatron checkpoint"),
    Case("load-iter", sft(load="ckpt/iter_0000001"), "--load ckpt/iter_0000001: give its parent"),
    Case("iter-missing", sft(load="iter-missing"), "names iter_0000007, which is missing"),
    Case("tracker-text", sft(load="tracker-text"), "tracker-text.*latest_checkpointed"),
    Case("args-cut", sft(load="args-cut", model=None), "args.json is not JSON"),
    Case("shard-gone", sft(load="shard-gone"), "--load shard-gone: .*distcp is missing"),
    Case("shard-short", sft(load="shard-short"), "--load shard-short: .*distcp.* cut short"),
    Case("metadata-cut", sft(load="metadata-cut"), "--load metadata-cut: .*.metadata"),
    Case("wide", sft(load="ckpt", model="wide"),
         "--load .*ckpt holds .*hidden_size=48, but .*wide says hidden_size=64", late=True),
    Case("deep", sft(load="ckpt", model="deep"), "ckpt holds.*num_layers=2.*=3", late=True),
    Case("other-family", sft(load="ckpt", model="qwen3"), "ckpt holds.*qk_layernorm", late=True),
    Case("wide-export", to_hf(model="wide"), "--mcore_model .*hidden_size", late=True),
    Case("mcore-missing", to_hf(mcore_model="nowhere"), "--mcore_model nowhere: no such folder"),
    Case("mcore-short", to_hf(mcore_model="shard-short"), "--mcore_model shard-short: .*distcp"),
    # What is written.
    Case("both-ways", to_mcore(to_hf="true"), "either --to_mcore true or --to_hf true"),
    Case("neither-way", export(model="llama"), "either --to_mcore true or --to_hf true"),
    Case("no-mcore-model", to_hf(mcore_model=None), "--to_hf true needs --mcore_model"),
    Case("output-not-empty", to_mcore(output_dir="gpt2"), "--output_dir .*gpt2 is not empty"),
    Case("output-is-file", to_mcore(output_dir="rows.jsonl"), "--output_dir .*jsonl is a file"),
    Case("output-below-file", to_mcore(output_dir="rows.jsonl/x"), "--output_dir .*rows.jsonl"),
    Case("save-is-file", sft(save="rows.jsonl"), "--save .*rows.jsonl is a file"),
    Case("save-below-file", sft(save="rows.jsonl/x"), "--save .*rows.jsonl"),
    Case("save-read-only", sft(save="/sys/swiftmeg"), "--save /sys/swiftmeg"),
    Case("shard-size", to_hf(max_shard_size="5 apples"), "--max_shard_size '5 apples'"),
    # The job.
    Case("processes", sft(), "NPROC_PER_NODE='abc' must be a", {"NPROC_PER_NODE": "abc"}),
    Case("nodes", sft(), "NNODES=2 needs MASTER_ADDR", {"NNODES": "2"}),
    Case("port", sft(), "MASTER_PORT=99999 is no port", {"NNODES": "1", "MASTER_PORT": "99999"}),
]  # fmt: skip


def edit_config(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a model folder and change its config.json; a change to None removes the key."""
    shutil.copytree(source, target)
    path = target / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def cut(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def make_models(work: Path) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    plain = save_model(work / "llama", "llama", num_hidden_layers=2, **sizes)
    save_model(work / "wide", "llama", num_hidden_layers=2, hidden_size=64, **sizes)
    save_model(work / "deep", "llama", num_hidden_layers=3, **sizes)
    save_model(work / "qwen3", "qwen3", num_hidden_layers=2, **sizes)

    def edited(name: str, **changes: Any) -> Path:
        return edit_config(plain, work / name, **changes)

    edited("kv-heads", num_attention_heads=6, num_key_value_heads=3)
    edited("ffn", intermediate_size=83)
    edited("gpt2", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    edited("new-type", architectures=["BrandNewForCausalLM"], model_type="brandnew")
    edited("no-architecture", architectures=None)
    edited("bad-heads", num_attention_heads="four")
    edited("hidden-act", hidden_act="gelu")
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    edited("rope-type", rope_parameters=rope)
    (edited("no-config") / "config.json").unlink()
    cut(edited("config-cut") / "config.json")
    (edited("config-list") / "config.json").write_text("[1]")
    for path in edited("no-tokenizer").glob("*token*"):
        path.unlink()
    cut(edited("tokenizer-cut") / "tokenizer.json")

    (edited("no-weights") / "model.safetensors").unlink()
    cut(edited("weights-cut") / "model.safetensors")
    weights = load_file(plain / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    changes: dict[str, dict[str, torch.Tensor]] = {
        "tensor-missing": {k: v for k, v in weights.items() if k != up},
        "tensor-unknown": weights | {"model.layers.1.extra.weight": torch.ones(3)},
        "shape": weights | {up: weights[up][1:].clone()},
        "last-stage": weights | {"model.norm.weight": torch.ones(47)},
        "vocabulary": weights
        | {k: v[:1000].clone() for k, v in weights.items() if v.shape[0] == 1003},
    }
    for name, changed in changes.items():
        save_file(changed, edited(name) / "model.safetensors", metadata={"format": "pt"})
    names = sorted(weights)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    sharded = edited("sharded")
    (sharded / "model.safetensors").unlink()
    for i, file in enumerate(files):
        save_file({k: weights[k] for k in names[i::2]}, sharded / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: files[i % 2] for i, k in enumerate(names)}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("shard-cut", "shard-missing", "index-cut"):
        shutil.copytree(sharded, work / name)
    cut(work / "shard-cut" / files[1], 0.7)
    (work / "shard-missing" / files[1]).unlink()
    cut(work / "index-cut" / "model.safetensors.index.json")


def make_data(work: Path) -> None:
    ask = {"role": "user", "content": "what?"}
    good = json.dumps({"messages": [ask, {"role": "assistant", "content": "yes " * 5}]})
    files = {
        "rows.jsonl": [good] * 8,
        "rows.xml": ["<row/>"],
        "empty.jsonl": [],
        "asked.jsonl": [json.dumps({"messages": [ask]})] * 2,
        "broken.jsonl": [good, good, good[:-4], good],
        "list.jsonl": [good, "[1]"],
    }
    for name, lines in files.items():
        (work / name).write_text("".join(line + "\n" for line in lines))
    (work / "latin.jsonl").write_bytes(good.replace("what", "w\xe4s").encode("latin-1") + b"\n")


def make_checkpoints(work: Path) -> None:
    run_ranks(1, _export, to_mcore(model=str(work / "llama"), output_dir=str(work / "ckpt"))[2:])

    def copied(name: str) -> Path:
        return Path(shutil.copytree(work / "ckpt", work / name))

    for name, text in (("iter-missing", "7"), ("tracker-text", "last")):
        (copied(name) / "latest_checkpointed_iteration.txt").write_text(text)
        (work / name / "iter_0000001" / "metadata.json").unlink()  # else a run would start from it
    cut(copied("args-cut") / "args.json")
    (shard,) = (work / "ckpt" / "iter_0000001").glob("*.distcp")
    place = shard.relative_to(work / "ckpt")
    (copied("shard-gone") / place).unlink()
    cut(copied("shard-short") / place)
    cut(copied("metadata-cut") / "iter_0000001" / ".metadata")


def _export(argv: list[str]) -> None:
    from swiftmeg.cli.export import main

    main(argv)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data and checkpoints, most of them broken; the tests leave it as it is."""
    work = tmp_path_factory.mktemp("inputs")
    make_models(work)
    make_data(work)
    make_checkpoints(work)
    return work


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_clear_line(case: Case, inputs: Path, tmp_path: Path) -> None:
    before = snapshot(inputs)
    code, text = run_forked(case, inputs, tmp_path)
    print(text)
    assert code == 1
    check_message(text, case.expected)
    assert snapshot(inputs) == before


@dataclass
class Ended:
    """How a command in a process of its own ended."""

    code: int
    out: str
    error: str
    seconds: float


def run_command(
    command: list[str], folder: Path, cache: Path, environ: dict[str, str] | None = None
) -> Ended:
    kept = {k: v for k, v in os.environ.items() if k not in JOB_VARIABLES}
    kept |= {"SWIFTMEG_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | (environ or {})
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "swiftmeg.cli.main", *command],
        cwd=folder,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=2 * SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Ended(process.returncode, out, error, time.monotonic() - started)


TWO = {"NPROC_PER_NODE": "2"}

COMMANDS = [
    # On both ranks before they meet, and on one of them when they have.
    Case("json-line", sft(dataset="broken.jsonl", strict="true"), "broken.jsonl:3: not JSON", TWO),
    Case(
        "last-stage",
        sft(model="last-stage", pipeline_model_parallel_size=2),
        r"model.norm.weight \(47,\)",
        TWO,
    ),
]


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.name)
def test_whole_command(case: Case, inputs: Path, tmp_path: Path) -> None:
    before = snapshot(inputs)
    ended = run_command(case.command, inputs, tmp_path, case.environ)
    assert ended.code == 1
    check_message(ended.error, case.expected)
    assert "error: " not in ended.out
    assert ended.seconds < SECONDS
    assert snapshot(inputs) == before


def test_port_in_use(inputs: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run_command(sft(), inputs, tmp_path, TWO | {"MASTER_PORT": port})
    assert ended.code == 1
    check_message(ended.error, f"MASTER_PORT={port} cannot be used")
    assert ended.seconds < SECONDS


def test_early_failure_needs_no_megatron(inputs: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from swiftmeg.cli.main import run; "
        "print(run('megatron', sys.argv[1:]), 'megatron.core' in sys.modules)"
    )
    words = sft(model="tensor-missing")[1:]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=inputs, capture_output=True, text=True
    )
    assert done.stdout == "1 False\n"
    check_message(done.stderr, "missing: model.layers.1.mlp.up_proj.weight")
