"""The forms in which checkpoints are published, and what each rank reads and writes of them."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from swiftmeg.errors import UserError
from swiftmeg.export.fp8 import dequantise
from swiftmeg.export.hf_files import HFWeights, check_names
from swiftmeg.models.hf import read_model
from tests.families.conversion import Layout, build, difference
from tests.families.folders import weights_of, write
from tests.families.specimens import ALL
from tests.ranks import run_ranks
from tests.runs import logged, run, training
from tests.tiny import save_tokenizer

Weights = dict[str, torch.Tensor]
BLOCK = (16, 12)
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, specimens: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    for name in ("deepseek_v3", "qwen3_moe", "qwen2"):
        shutil.copytree(specimens(name), folder / name)
    wider = {
        "gpt_oss-32": {"hidden_size": 64},
        "gpt_oss-text": {"hidden_size": 64, "vocab_size": 331},
        "deepseek_v3-text": {"vocab_size": 331},
    }
    for name, sizes in wider.items():
        specimen = ALL[name.partition("-")[0]]
        write(folder / name, dataclasses.replace(specimen, sizes=specimen.sizes | sizes), seed=1)
    return folder


def derive(root: Path, name: str, change: Callable[[Weights], Weights], **config: Any) -> Path:
    """A folder like `name` with changed tensors and config.json."""
    folder = root / f"{name}-{change.__name__}"
    if folder.exists():
        return folder
    shutil.copytree(root / name, folder)
    weights = change(weights_of(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def expand(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return torch.kron(scale, torch.ones(BLOCK))[: shape[0], : shape[1]]


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    kept = ("embed", "lm_head", "norm", "mlp.gate.")
    return tensor.dim() == 2 and not any(word in name for word in kept)


def quantised(weights: Weights) -> Weights:
    """Matrices as fp8 with a random scale a block, as DeepSeek-V3 stores them."""
    result = dict(weights)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        if is_quantised(name, tensor):
            blocks = [-(-size // block) for size, block in zip(tensor.shape, BLOCK, strict=True)]
            scale = torch.rand(blocks, generator=generator) * 0.01 + 1e-3
            divided = tensor / expand(scale, tensor.shape)
            result[name] = divided.clamp(-448, 448).to(torch.float8_e4m3fn)
            result[name + "_scale_inv"] = scale
    return result


def stacked(weights: Weights) -> Weights:
    """The experts of a layer in one tensor, as transformers 5 holds them in memory."""
    result = {k: v for k, v in weights.items() if ".experts." not in k}
    layers = {k.split(".experts.")[0] for k in weights if ".experts." in k}
    for layer in layers:
        parts = [
            [weights[f"{layer}.experts.{e}.{part}_proj.weight"] for e in range(6)]
            for part in ("gate", "up", "down")
        ]
        gate, up, down = (torch.stack(part) for part in parts)
        result[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        result[f"{layer}.experts.down_proj"] = down
    return result


def unprefixed(weights: Weights) -> Weights:
    """As saved from the model without its head."""
    return {k.removeprefix("model."): v for k, v in weights.items()}


def with_buffers(weights: Weights) -> Weights:
    """As older transformers saved RoPE's frequencies; the tied head is stored as well."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    return weights | {
        name: torch.ones(3),
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
    }


def with_a_stranger(weights: Weights) -> Weights:
    return weights | {"model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(3)}


def with_another_head(weights: Weights) -> Weights:
    """A config.json that says tied, beside a head that is not: transformers would untie them."""
    return weights | {"lm_head.weight": 2 * weights["model.embed_tokens.weight"]}


def test_a_head_that_is_not_the_embedding_is_not_tied(root: Path) -> None:
    folder = derive(root, "qwen2", with_another_head)
    with pytest.raises(RuntimeError, match="has other values than model"):
        run_ranks(1, difference, folder, Layout(1))


def test_fp8_blocks_are_read_exactly(root: Path) -> None:
    folder = derive(root, "deepseek_v3", quantised, quantization_config=QUANTIZATION)
    stored = weights_of(folder)
    model = read_model(str(folder))
    weights = HFWeights(folder, model.config)
    check_names(model.family, model.config, weights)
    scaled = [name for name in stored if name + "_scale_inv" in stored]
    assert len(scaled) > 50
    for name in scaled:
        scale = stored[name + "_scale_inv"]
        expected = stored[name].float() * expand(scale, stored[name].shape)
        assert torch.equal(weights.read(name), expected), name
        assert weights.read(name).abs().max() > 0


def test_fp8_that_does_not_fit_is_refused(root: Path) -> None:
    def unscaled(weights: Weights) -> Weights:
        name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
        return {k: v for k, v in quantised(weights).items() if k != name}

    folder = derive(root, "deepseek_v3", unscaled, quantization_config=QUANTIZATION)
    weights = HFWeights(folder, read_model(str(folder)).config)
    with pytest.raises(UserError, match=r"experts\.3\.up_proj\.weight_scale_inv is missing"):
        weights.read("model.layers.1.mlp.experts.3.up_proj.weight")
    with pytest.raises(ValueError, match="scales"):
        dequantise(torch.ones(40, 20).to(torch.float8_e4m3fn), torch.ones(3, 3), BLOCK)
    with pytest.raises(UserError, match="quant_method='gptq'"):
        HFWeights(folder, {"quantization_config": {"quant_method": "gptq"}})


def in_mxfp4(weights: Weights) -> Weights:
    """Experts' matrices as random MXFP4 blocks and scales, as gpt-oss is published."""
    result = dict(weights)
    generator = torch.Generator().manual_seed(4)
    for name in [name for name in weights if name.endswith("experts.gate_up_proj")]:
        experts, columns, rows = result.pop(name).shape
        shape = (experts, rows, columns // 32, 16)
        draw = {"generator": generator, "dtype": torch.uint8}
        result[name + "_blocks"] = torch.randint(0, 256, shape, **draw)
        result[name + "_scales"] = torch.randint(118, 126, shape[:-1], **draw)
    return result


def test_mxfp4_is_read_as_transformers_reads_it(root: Path) -> None:
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    folder = derive(root, "gpt_oss-32", in_mxfp4, **config)
    stored = weights_of(folder)
    model = read_model(str(folder))
    weights = HFWeights(folder, model.config)
    plan = check_names(model.family, model.config, weights)
    rows = [row for row in plan if row.stack and row.stack in weights.packed]
    assert len(rows) == 4 * 6
    for row in rows:
        (part,) = weights.parts(row)
        found = part.read()
        blocks, scales = (stored[row.stack + part] for part in ("_blocks", "_scales"))
        expected = convert_moe_packed_tensors(blocks, scales)[row.expert]
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert found.abs().max() > 0
    weights._places[f"{rows[0].stack}_scales"] = weights._places["model.norm.weight"]
    with pytest.raises(UserError, match="dequantise"):
        weights.parts(rows[0])[0].read()


def test_names_are_strict(root: Path) -> None:
    for change in (unprefixed, with_buffers):
        folder = derive(root, "qwen2", change)
        model = read_model(str(folder))
        check_names(model.family, model.config, HFWeights(folder, model.config))
    folder = derive(root, "qwen2", with_a_stranger)
    with pytest.raises(UserError, match=r"rotary_emb\.cos_cached"):
        check_names(model.family, model.config, HFWeights(folder, model.config))


def parameters_of(folder: str) -> Weights:
    """Every weight of a folder's model."""
    from swiftmeg.export.hf_reader import load_hf
    from swiftmeg.export.shards import live_weights

    model, models, dims = build(Path(folder), Layout(1))
    load_hf(models, folder, model.family, model.config, dims)
    return {live.name: live.tensor.detach() for live in live_weights(models)}


def unequal(pairs: list[tuple[str, str]]) -> list[str]:
    """What differs between the models of two folders, over all pairs."""
    found = []
    for one, other in pairs:
        ours, theirs = parameters_of(one), parameters_of(other)
        assert len(ours) > 10
        found += list(ours.keys() ^ theirs.keys())
        found += [name for name in ours if not torch.equal(ours[name], theirs[name])]
    return found


def dequantised(weights: Weights) -> Weights:
    result = {k: v for k, v in quantised(weights).items() if not k.endswith("_scale_inv")}
    scales = quantised(weights)
    for name, tensor in result.items():
        if tensor.dtype == torch.float8_e4m3fn:
            result[name] = tensor.float() * expand(scales[name + "_scale_inv"], tensor.shape)
    return result


def test_models_of_other_forms_are_the_same(root: Path) -> None:
    pairs = [
        (
            derive(root, "deepseek_v3", quantised, quantization_config=QUANTIZATION),
            derive(root, "deepseek_v3", dequantised),
        ),
        (root / "qwen3_moe", derive(root, "qwen3_moe", stacked)),
        (root / "qwen2", derive(root, "qwen2", unprefixed)),
    ]
    assert run_ranks(1, unequal, [(str(one), str(other)) for one, other in pairs]) == [[]]


def names_read(folder: str, layout: Layout) -> set[str]:
    """The HF tensors that this rank opens to load its part."""
    read: set[str] = set()
    original = HFWeights.read

    def record(self: HFWeights, name: str, *block: Any) -> torch.Tensor:
        read.add(name)
        return original(self, name, *block)

    HFWeights.read = record  # type: ignore[method-assign]
    try:
        difference(Path(folder), layout)
    finally:
        HFWeights.read = original  # type: ignore[method-assign]
    return read


def test_each_rank_reads_what_it_holds(root: Path) -> None:
    folder = root / "qwen3_moe"
    layout = Layout(4, pipeline=2, expert=2)
    ranks = run_ranks(4, names_read, str(folder), layout)
    everything = set(weights_of(folder))
    assert set().union(*ranks) == everything
    for rank, read in enumerate(ranks):
        stage, half = divmod(rank, 2)
        layers = {int(name.split(".")[2]) for name in read if ".layers." in name}
        assert layers == {2 * stage, 2 * stage + 1}
        experts = {
            int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name
        }
        assert experts == {3 * half, 3 * half + 1, 3 * half + 2}
        assert ("model.embed_tokens.weight" in read) == (stage == 0)
        assert ("lm_head.weight" in read) == (stage == 1)


def save(source: str, target: str, layout: Layout, die_at: str | None = None) -> list[str]:
    """Save a model; returns the files that this rank wrote. Dies as it writes tensor `die_at`."""
    from swiftmeg.export import safetensors_writer
    from swiftmeg.export.hf_reader import load_hf
    from swiftmeg.export.hf_writer import save_hf

    written = []
    original = safetensors_writer._write_file

    def watch(path: Path, content: Any, tensors: Any) -> None:
        def until_death() -> Any:
            for name, tensor in tensors:
                if name == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield name, tensor

        written.append(path.name)
        original(path, content, until_death() if die_at else tensors)

    safetensors_writer._write_file = watch
    folder = Path(source)
    model, models, dims = build(folder, layout)
    load_hf(models, folder, model.family, model.config, dims)
    save_hf(
        models,
        Path(target),
        folder,
        model.family,
        model.config,
        dims,
        dtype=torch.float32,
    )
    return written


def test_each_rank_writes_its_share(root: Path, tmp_path: Path) -> None:
    layout = Layout(4, tensor=2, pipeline=2)
    ranks = run_ranks(4, save, str(root / "qwen3_moe"), str(tmp_path / "out"), layout)
    assert all(len(files) == 1 for files in ranks)
    sizes = [(tmp_path / "out" / files[0]).stat().st_size for files in ranks]
    for stage in (sizes[:2], sizes[2:]):
        assert max(stage) < 1.5 * min(stage)
    before, after = weights_of(root / "qwen3_moe"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_killed_save_leaves_the_previous_one(root: Path, tmp_path: Path) -> None:
    source, target = root / "qwen3_moe", tmp_path / "out"
    run_ranks(1, save, str(source), str(target), Layout(1))
    with pytest.raises(RuntimeError, match="died without a word"):
        run_ranks(1, save, str(source), str(target), Layout(1), "model.layers.3.mlp.gate.weight")
    before, after = weights_of(source), weights_of(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    read_model(str(target))
    broken = tmp_path / ".out.unfinished"
    assert broken.is_dir()
    with pytest.raises(UserError, match=r"\.out\.unfinished: .* was not completed"):
        read_model(str(broken))
    run_ranks(1, save, str(source), str(target), Layout(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", ["deepseek_v3-text", "gpt_oss-text"])
def test_training_begins_from_quantised_weights(root: Path, tmp_path: Path, name: str) -> None:
    fp8 = name.startswith("deepseek")
    quantization = QUANTIZATION if fp8 else {"quant_method": "mxfp4"}
    change = quantised if fp8 else in_mxfp4
    folder = derive(root, name, change, quantization_config=quantization)
    save_tokenizer(folder, read_model(str(folder)).config["vocab_size"])
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    steps = {"train_iters": 1, "global_batch_size": 1, "no_save_optim": "true"}
    run("sft", 1, training(tmp_path, tmp_path / "out", str(folder), **steps))
    (line,) = logged(tmp_path / "out")
    assert 0 < line["lm loss"] < 20
