"""Frozen parameters stay as they are and cost nothing; the others get transformers' gradients."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftmeg.claim import LOCK
from tests.ranks import run_ranks
from tests.references import relative, transformers_loss, write_rows
from tests.runs import DESCENT, PIPELINE, SEQUENCE, command, load_folder, run, training
from tests.sizes import BIASED
from tests.tiny import save_model

LR = DESCENT["lr"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("freezing")
    for name, tied in (("tied", True), ("untied", False)):
        save_model(folder / name, "llama", tie_word_embeddings=tied, **BIASED)
    write_rows(folder)
    return folder


def argv(work: Path, model: str, save: Path, flags: dict[str, Any]) -> list[str]:
    return training(work, save, model, **DESCENT | flags)


def train_and_count(words: list[str]) -> int:
    """`megatron sft`; returns how many gradients this rank has room for."""
    from megatron.core.distributed import DistributedDataParallel

    made = []
    start = DistributedDataParallel.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        made.append(self)

    DistributedDataParallel.__init__ = recording
    command("sft", words)
    return sum(p.numel() for ddp in made for p in ddp.parameters() if hasattr(p, "main_grad"))


RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
CASES: dict[str, tuple[str, int, dict[str, Any], str]] = {
    # name: model, ranks, flags, which HF tensors are trained
    "prefixes": (
        "untied",
        1,
        RECOMPUTE | {"freeze_parameters": ["embedding.", "decoder.layers.0."]},
        r"layers\.[1-3]\.|^model\.norm|lm_head",
    ),
    "weights but not biases": (
        "untied",
        2,
        SEQUENCE | {"freeze_parameters_regex": r"weight$"},
        r"bias$",
    ),
    "a whole stage, and all but a layer of the other": (
        "tied",
        2,
        PIPELINE
        | {
            "freeze_parameters": ["embedding.", "decoder"],
            "trainable_parameters": ["decoder.layers.3."],
        },
        r"layers\.3\.",
    ),
    "all but what TransformerEngine calls a fused norm": (
        "tied",
        2,
        PIPELINE
        | {
            "freeze_parameters_regex": ".",
            "trainable_parameters_regex": r"linear_fc1\.layer_norm_weight|word_embeddings",
        },
        r"post_attention_layernorm|embed_tokens",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_only_the_others_are_trained(work: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    name, world, flags, trained = CASES[case]
    save = work / f"out-{list(CASES).index(case)}"
    counts = run_ranks(world, train_and_count, argv(work, name, save, flags))
    (line,) = [json.loads(line) for line in (save / "logging.jsonl").read_text().splitlines()]
    before, after = load_folder(work / name), load_folder(save / "iter_0000001-hf")
    model = AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32)
    loss = transformers_loss(model, work / name)
    loss.backward()
    assert relative(line["lm loss"], loss.item()) <= 1e-5
    gradients = dict(model.named_parameters())
    assert any(re.search(trained, key) for key in before)
    for key, old in before.items():
        if not re.search(trained, key):
            assert torch.equal(after[key], old), key
            continue
        gradient = gradients[key].grad
        assert gradient is not None
        found = (old - after[key]) / LR
        assert (found - gradient).norm() / gradient.norm() <= 1e-5, key
    norms = [p.grad.double().norm() for k, p in gradients.items() if re.search(trained, k)]  # type: ignore[union-attr]
    assert relative(line["grad_norm"], torch.stack(norms).norm().item()) <= 1e-4
    if "sequence_parallel" not in flags:  # whose ranks hold copies of some biases
        vocabulary = [key for key in before if re.search(trained, key) and "_tokens" in key]
        vocabulary += [key for key in before if re.search(trained, key) and "lm_head" in key]
        elements = sum(old.numel() for key, old in before.items() if re.search(trained, key))
        padding = len(vocabulary) * (1024 - 1003) * 64
        copies = world - 1 if name == "tied" and vocabulary else 0
        assert sum(counts) == elements + padding + copies * 1024 * 64


def test_the_optimizer_holds_trained_parameters_alone(work: Path) -> None:
    """The first half of the weights: the embedding, and what fits of the layers."""
    from torch.distributed.checkpoint import FileSystemReader

    save = work / "ratio"
    adam = {"optimizer": "adam", "lr": 1e-3, "use_distributed_optimizer": "true"}
    flags = {"freeze_parameters_ratio": 0.5, "save_safetensors": "false", **adam, "min_lr": 0}
    run("sft", 2, argv(work, "untied", save, flags | SEQUENCE))
    names = FileSystemReader(save / "iter_0000001").read_metadata().state_dict_metadata
    weights = {key for key in names if not key.startswith(("optimizer", "rng_state", "args"))}
    moments = {
        key.removeprefix("optimizer.state.exp_avg.")
        for key in names
        if key.startswith("optimizer.state.exp_avg.")
    }
    assert moments
    assert moments < weights
    sizes = {key: names[key].size.numel() for key in weights if key.endswith(("weight", "bias"))}
    frozen = sum(size for key, size in sizes.items() if key not in moments)
    assert 0.4 < frozen / sum(sizes.values()) <= 0.5
    assert "embedding.word_embeddings.weight" not in moments
    assert "output_layer.weight" in moments


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"freeze_parameters": ["decoder", "layers.0"]}, "--freeze_parameters layers.0 fits no"),
        ({"freeze_parameters_regex": "x"}, "--freeze_parameters_regex x fits no parameter"),
        ({"freeze_parameters_regex": "."}, "freeze every parameter of the model"),
    ],
)
def test_patterns_must_fit(work: Path, flags: dict[str, Any], line: str) -> None:
    with pytest.raises(RuntimeError, match=line):
        run("sft", 2, argv(work, "tied", work / "none", flags | PIPELINE))
    assert [path.name for path in (work / "none").iterdir()] == [LOCK]
