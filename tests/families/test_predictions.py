"""Multi-token prediction modules as published: kept bit for bit, left out, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swiftmeg.errors import UserError
from swiftmeg.export.hf_files import HFWeights, check_names
from swiftmeg.models.hf import read_model
from tests.families.conversion import Layout, build
from tests.families.folders import weights_of
from tests.ranks import run_ranks

AFTER_THE_DECODER = {
    "norms": ("enorm", "hnorm", "shared_head.norm"),
    "joins": "eh_proj",
    "copies": {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "shared_head.head.weight": "lm_head.weight",
    },
}
PUBLISHED = {
    "deepseek_v3": ("model.layers.{n}.", AFTER_THE_DECODER),
    "glm4_moe": ("model.layers.{n}.", AFTER_THE_DECODER),
    "mimo": (
        "model.mtp_layers.0.",
        {
            "norms": ("token_layernorm", "hidden_layernorm", "final_layernorm"),
            "joins": "input_proj",
            "copies": {},
        },
    ),
    "qwen3_next": (
        "mtp.",
        {
            "norms": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"),
            "joins": "fc",
            "copies": {},
            "layer": "layers.0.",
        },
    ),
}
"""Specimens, and what a module is made of beside a layer like the decoder's last."""

LAYOUTS = {
    "one": Layout(1),
    "tp2": Layout(2, tensor=2),
    "pp2": Layout(2, pipeline=2),
    "ep2": Layout(2, expert=2),
}


def add_module(folder: Path, name: str) -> None:
    """Give a specimen a prediction module of random weights."""
    prefix, parts = PUBLISHED[name]
    weights = weights_of(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    count, size = config["num_hidden_layers"], config["hidden_size"]
    prefix = prefix.replace("{n}", str(count))
    last = f"model.layers.{count - 1}."
    torch.manual_seed(3)
    module = {
        prefix + parts.get("layer", "") + key.removeprefix(last): torch.randn_like(tensor)
        for key, tensor in weights.items()
        if key.startswith(last)
    }
    module |= {f"{prefix}{norm}.weight": torch.randn(size) for norm in parts["norms"]}
    module[f"{prefix}{parts['joins']}.weight"] = torch.randn(size, 2 * size)
    module |= {prefix + key: weights[of].clone() for key, of in parts["copies"].items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(weights | module, folder / "model.safetensors", {"format": "pt"})
    path.write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, specimens: Callable[[str], Path]) -> Path:
    root = tmp_path_factory.mktemp("predictions")
    for name in PUBLISHED:
        shutil.copytree(specimens(name), root / name)
        add_module(root / name, name)
    return root


def round_trip(root: str, out: str, names: list[str], layout: Layout, count: int) -> None:
    """Each model to Megatron, into a checkpoint, out of it and back, with `count` modules."""
    from swiftmeg.export.hf_reader import load_hf
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.lazy_weights import fill_all
    from swiftmeg.export.mcore_reader import CheckpointSupply
    from swiftmeg.export.model import save_mcore

    for name in names:
        folder, target = Path(root, name), Path(out, name)
        model, models, dims = build(folder, layout, mtp_num_layers=count)
        load_hf(models, folder, model.family, model.config, dims)
        target.mkdir(parents=True, exist_ok=True)
        save_mcore(models, target / "mcore")
        with torch.no_grad():
            for chunk in models:
                for tensor in chunk.parameters():
                    tensor.fill_(float("nan"))
        fill_all(models, CheckpointSupply(models, Path(target / "mcore")))
        save_hf(
            models, target / "hf", folder, model.family, model.config, dims, dtype=torch.float32
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_come_back_bit_for_bit(root: Path, tmp_path: Path, layout: str) -> None:
    names = [name for name in PUBLISHED if layout != "ep2" or name != "mimo"]
    shared = LAYOUTS[layout]
    run_ranks(shared.world, round_trip, str(root), str(tmp_path), names, shared, 1)
    for name in names:
        before, after = weights_of(root / name), weights_of(tmp_path / name / "hf")
        assert before.keys() == after.keys(), name
        assert [k for k in before if not torch.equal(before[k], after[k])] == [], name


def test_zero_leaves_them_out(root: Path, tmp_path: Path) -> None:
    run_ranks(1, round_trip, str(root), str(tmp_path), list(PUBLISHED), LAYOUTS["one"], 0)
    for name in PUBLISHED:
        left = weights_of(root / name).keys() - weights_of(tmp_path / name / "hf").keys()
        count = read_model(str(root / name)).config["num_hidden_layers"]
        prefix = PUBLISHED[name][0].replace("{n}", str(count))
        assert left == {key for key in weights_of(root / name) if key.startswith(prefix)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_silence_is_refused(root: Path, name: str) -> None:
    model = read_model(str(root / name))
    with pytest.raises(UserError, match="--mtp_num_layers 1 to keep them, or --mtp_num_layers 0"):
        check_names(model.family, model.config, HFWeights(model.folder, model.config))
