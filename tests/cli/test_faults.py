"""What comes from elsewhere is data: hostile and damaged files end in one line, and run nothing."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swiftmeg.args.commands import ExportArguments, SftArguments
from swiftmeg.args.flags import parse_flags
from swiftmeg.args.infer import InferArguments
from swiftmeg.args.read import inherited
from swiftmeg.args.resolve import COMMAND_LINE_ALONE, read_args_file, resolve
from swiftmeg.checkpoint import TRACKER
from swiftmeg.unpickling import INDEX, read_index
from tests.cli.commands import (
    Case,
    check_message,
    run_forked,
    run_together,
    sft,
    to_hf,
    to_mcore,
    words,
)
from tests.ranks import run_ranks
from tests.test_unpickling import Call, saved
from tests.tiny import save_model


def infer(**changes: Any) -> list[str]:
    return words("swift infer", {"model": "llama", "val_dataset": "rows.jsonl"}, changes)


EARLY = [
    *(
        Case(f"{name}-{where}", command, expected)
        for name, expected in (
            ("index-code", r"\.metadata asks for posix.system"),
            ("index-path", r"\.metadata names '../../rows.jsonl', which is outside of its folder"),
            ("index-none", r"\.metadata cannot be read \(it is no index of a checkpoint\)"),
        )
        for where, command in (
            ("sft", sft(load=name)),
            ("dry-run", sft(load=name, dry_run="true", dataset=None)),
            ("lora", sft(load=name, train_type="lora")),
            ("export", to_hf(mcore_model=name)),
            ("merge", to_hf(mcore_model=None, mcore_adapters=f"{name}-lora")),
        )
    ),
    *(
        Case(f"tracker-{i}", sft(load=f"tracker-{i}"), rf"latest_checkpointed.*({expected})")
        for i, expected in enumerate(("is missing|missing or inc", *["no number"] * 4))
    ),
    Case("args-null", sft(load="args-null", model=None), "args.json holds null, not an object"),
    Case("args-deep", sft(load="args-deep", model=None), "args.json is not JSON"),
    Case("index-null", sft(model="index-null"), "index.json is not a safetensors index"),
    Case("index-list", sft(model="index-list"), "index.json is not a safetensors index"),
    Case("map-null", sft(model="map-null"), "index.json is not a safetensors index"),
    Case("map-number", sft(model="map-number"), "index.json is not a safetensors index"),
    Case("map-outside", sft(model="map-outside"), r"index.json names '../w.safetensors' for .*out"),
    Case("map-absolute", sft(model="map-absolute"), "index.json names '/tmp/w.safetensors'"),
    Case("remote-code", sft(model="remote-code"), "^error: --trust_remote_code true is needed"),
    Case("remote-code-2", to_hf(model="remote-code"), "^error: --trust_remote_code true is needed"),
    Case("remote-code-3", sft(load="trusting", model=None), "--trust_remote_code true is needed"),
    *(
        Case(f"config-{i}-{where}", command(model=f"config-{i}"), f"config-{i}: config.json.*{key}")
        for i, key in enumerate(("hidden_size", "vocab_size", "", "", "rms_norm_eps", "num_hidden"))
        for where, command in (("sft", sft), ("export", to_mcore))
    ),
    Case("seed", sft(seed=-1), "--seed -1: must be from 0 to 4294967295"),
    Case("data-seed", sft(data_seed=2**32), "--data_seed 4294967296: must be from 0"),
    Case("file-infer", infer(model="rows.jsonl"), "--model rows.jsonl: is a file: name the folder"),
    Case("file-sft", sft(model="sub/model.gguf"), "--model sub/model.gguf: is a file: name the fo"),
    Case("yaml-bomb", ["megatron", "sft", "bomb.yaml"], "bomb.yaml: its aliases make more than"),
    Case("yaml-merge", ["megatron", "sft", "merge.yaml"], "merge.yaml: its aliases make more"),
    Case("yaml-loop", ["megatron", "sft", "loop.yaml"], "loop.yaml: an alias stands inside"),
    Case("yaml-deep", ["megatron", "sft", "deep.yaml"], "deep.yaml: it is nested too deeply"),
    Case("yaml-long", ["megatron", "sft", "long.yaml"], "long.yaml: has more than"),
    Case("yaml-twice", ["megatron", "sft", "twice.yaml"], "twice.yaml: line 3 gives lr again"),
    Case("yaml-spelled", ["megatron", "sft", "spelled.yaml"], "min_lr is given twice: keep one"),
    Case("yaml-number", ["megatron", "sft", "number.yaml"], "number.yaml: is not YAML"),
]  # fmt: skip

LATE = [
    Case("item-sft", sft(load="item-code"), "distcp asks for posix.system", late=True),
    Case("item-export", to_hf(mcore_model="item-code"), "distcp asks for posix.system", late=True),
    Case("format", to_hf(mcore_model="other-format"), "metadata.json says 'zarr' of", late=True),
    Case("old-export", to_hf(mcore_model="common-code"), "common.pt asks for posix.sys", late=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data and checkpoints that a stranger made."""
    work = tmp_path_factory.mktemp("faults")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    save_model(work / "llama", "llama", num_hidden_layers=2, **sizes)
    ask = {"role": "user", "content": "what?"}
    row = json.dumps({"messages": [ask, {"role": "assistant", "content": "yes " * 5}]})
    (work / "rows.jsonl").write_text((row + "\n") * 8)
    make_checkpoints(work)
    make_models(work)
    make_yaml(work)
    return work


def make_checkpoints(work: Path) -> None:
    export = ["--model", str(work / "llama"), "--to_mcore", "true"]
    run_ranks(1, _export, [*export, "--output_dir", str(work / "ckpt")])

    def copied(name: str) -> Path:
        return Path(shutil.copytree(work / "ckpt", work / name)) / "iter_0000001"

    call = Call(os.system, f"touch {work / 'ran'}")
    (copied("index-code") / INDEX).write_bytes(pickle.dumps(call))
    (copied("index-none") / INDEX).write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    (copied("other-format") / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    outside = copied("index-path")
    index = read_index(outside / INDEX)
    places = index.storage_data
    key = next(iter(places))
    places[key] = dataclasses.replace(places[key], relative_path="../../rows.jsonl", length=1)
    (outside / INDEX).write_bytes(pickle.dumps(index))
    _replace_item(copied("item-code"), saved(call))
    (copied("common-code") / "common.pt").write_bytes(saved(call))
    for name in ("index-code", "index-path", "index-none"):
        lora = copied(f"{name}-lora").parent
        args = json.loads((lora / "args.json").read_text()) | {"train_type": "lora"}
        (lora / "args.json").write_text(json.dumps(args))
        shutil.rmtree(lora / "iter_0000001")
        shutil.copytree(work / name / "iter_0000001", lora / "iter_0000001")
    for i, text in enumerate(("release", "-1", "1e3", "9" * 6000, "../../x")):
        folder = copied(f"tracker-{i}")
        (folder.parent / TRACKER).write_text(text)
        (folder / "metadata.json").unlink()  # else a run would start from it
    (copied("args-null").parent / "args.json").write_text("null")
    (copied("args-deep").parent / "args.json").write_text("[" * 10**5)
    trusting = copied("trusting").parent / "args.json"
    remote = {"model": str(work / "remote-code"), "trust_remote_code": True}
    trusting.write_text(json.dumps(json.loads(trusting.read_text()) | remote))


def _export(argv: list[str]) -> None:
    from swiftmeg.cli.export import main

    main(argv)


def _replace_item(iteration: Path, content: bytes) -> None:
    """Let the entry that holds the run's arguments be another one."""
    index = read_index(iteration / INDEX)
    (key,) = (key for key in index.storage_data if key.fqn.startswith("common_state"))
    place = index.storage_data[key]
    with (iteration / place.relative_path).open("ab") as file:
        offset = file.tell()
        file.write(content)
    index.storage_data[key] = dataclasses.replace(place, offset=offset, length=len(content))
    (iteration / INDEX).write_bytes(pickle.dumps(index))


def make_models(work: Path) -> None:
    code = f"open({str(work / 'ran')!r}, 'w')\nraise SystemExit\n"
    remote = Path(shutil.copytree(work / "llama", work / "remote-code"))
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "configuration_mine.py").write_text(code)
    (work / "sub").mkdir()
    (work / "sub" / "model.gguf").touch()
    for i, change in enumerate(CONFIGS):
        folder = Path(shutil.copytree(work / "llama", work / f"config-{i}"))
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
    weights = {"model.norm.weight": torch.ones(48)}
    save_file(weights, work / "w.safetensors")
    indices: dict[str, Any] = {
        "index-null": None,
        "index-list": [1],
        "map-null": {"weight_map": None},
        "map-number": {"weight_map": {"model.norm.weight": 3}},
        "map-outside": {"weight_map": {"model.norm.weight": "../w.safetensors"}},
        "map-absolute": {"weight_map": {"model.norm.weight": "/tmp/w.safetensors"}},
    }
    for name, content in indices.items():
        folder = Path(shutil.copytree(work / "llama", work / name))
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))


CONFIGS: list[dict[str, Any]] = [
    {"hidden_size": 10**9},
    {"vocab_size": 0},
    {"num_attention_heads": 0},
    {"rope_theta": "abc", "rope_parameters": {"rope_type": "default", "rope_theta": "abc"}},
    {"rms_norm_eps": float("nan")},
    {"num_hidden_layers": 2**40},
]


def make_yaml(work: Path) -> None:
    bomb = ["a0: &a0 [x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ]
    merge = ["a0: &a0 {k: 1}"] + [
        f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)
    ]
    texts = {
        "bomb": "\n".join(bomb),
        "merge": "\n".join(merge),
        "loop": "model: &a [*a]",
        "deep": "model: " + "[" * 50_000,
        "long": "model: " + "x" * 10**6,
        "twice": "model: llama\nlr: 1\nlr: 2",
        "spelled": "model: llama\nmin-lr: 1\nmin_lr: 2",
        "number": "model: llama\nseed: " + "9" * 5000,
    }
    for name, text in texts.items():
        (work / f"{name}.yaml").write_text(text)


@pytest.fixture(scope="module")
def ended(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """How the early cases end, in one process after another."""
    results = run_together(EARLY, inputs, tmp_path_factory.mktemp("early"))
    return dict(zip((case.name for case in EARLY), results, strict=True))


@pytest.mark.parametrize("case", EARLY, ids=lambda case: case.name)
def test_one_line(case: Case, ended: dict[str, tuple[int, str]], inputs: Path) -> None:
    code, text = ended[case.name]
    assert code == 1
    check_message(text, case.expected)
    assert not (inputs / "ran").exists()


@pytest.mark.parametrize("case", LATE, ids=lambda case: case.name)
def test_one_line_of_a_running_command(case: Case, inputs: Path, tmp_path: Path) -> None:
    code, text = run_forked(case, inputs, tmp_path)
    assert code == 1
    check_message(text, case.expected)
    assert not (inputs / "ran").exists()
    assert not (inputs / "out").exists()


def test_of_a_flag_given_twice_the_last_counts(inputs: Path, tmp_path: Path) -> None:
    """Scripts are called with more flags than they hold."""
    case = Case("", [*sft(train_iters=None), "--model", "gone", "--min-lr", "1", "--min_lr=2"], "")
    code, text = run_forked(case, inputs, tmp_path)
    assert code == 1
    assert "--model is given twice: the last counts: gone" in text
    assert "--min_lr is given twice: the last counts: 2.0" in text
    check_message(text, "--model gone: no such folder")


RUNS_CODE = {
    "trust_remote_code": True,
    "external_plugins": ["evil.py"],
    "custom_register_path": ["evil.py"],
    "model_kwargs": {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    "extra_megatron_kwargs": {"ckpt_format": "torch"},
}
"""Arguments that run code or widen what libraries may do."""

OF_THE_MODEL = {
    *("model", "torch_dtype", "template", "system", "new_special_tokens"),
    *("max_model_len", "rope_scaling", "rotary_base", "norm_epsilon", "mtp_num_layers"),
}
"""What a checkpoint says about its model; none of these can run anything."""


@pytest.mark.parametrize("cls", [SftArguments, ExportArguments, InferArguments])
def test_no_file_widens_trust(cls: type[Any], tmp_path: Path) -> None:
    """Every argument of every command in a hostile args.json: only harmless ones are taken."""
    fields = {field.name for field in dataclasses.fields(cls)}
    assert set(COMMAND_LINE_ALONE) == set(RUNS_CODE)
    hostile = dict.fromkeys(fields, "hostile") | {k: v for k, v in RUNS_CODE.items() if k in fields}
    (tmp_path / "args.json").write_text(json.dumps(hostile))
    everything = [("args.json", read_args_file(tmp_path))]
    args, sources = resolve(cls, {}, everything)
    plain, _ = resolve(cls, {}, [])
    for name in RUNS_CODE.keys() & fields:
        assert getattr(args, name) == getattr(plain, name), name
        assert sources[name] == "default"
    taken = {name for _, layer in inherited(str(tmp_path), {}) for name in layer}
    assert taken <= OF_THE_MODEL
    given = parse_flags(cls, ["--trust_remote_code", "true"], "x")
    args, _ = resolve(cls, given, everything)
    assert args.trust_remote_code is True
