"""Folders that PEFT wrote are merged as PEFT does, or refused by the name of what is not known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swiftmeg.errors import UserError
from tests.tuners.peft_made import (
    MODELS,
    base_model,
    edit_config,
    edit_tensors,
    logits,
    make,
    merge,
    reload,
    write_models,
)

QV = ["q_proj", "v_proj"]
LINEAR = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TABLES = ["embed_tokens", "lm_head"]

LIKE_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "tables": ("llama", {"target_modules": [*QV, *TABLES]}),
    "head": ("biased", {"target_modules": ["lm_head"]}),
    "head-saved-embedding": (
        "llama",
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens", "norm"]},
    ),
    "tied-saved-together": (
        "tied",
        {"target_modules": QV, "modules_to_save": TABLES[:1], "ensure_weight_tying": True},
    ),
    "tied-saved-embedding": ("tied", {"target_modules": QV, "modules_to_save": TABLES[:1]}),
    "tied-saved-head": ("tied", {"target_modules": QV, "modules_to_save": TABLES[1:]}),
    "tied-saved-both": ("tied", {"target_modules": QV, "modules_to_save": TABLES}),
    "experts": (
        "moe",
        {
            "target_modules": QV,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"experts.gate_up_proj": 11},
        },
    ),
    "grown": ("llama", {"rows": 5, "target_modules": QV}),
    "grown-tied": ("tied", {"rows": 5, "target_modules": QV}),
    "grown-factors": ("biased", {"rows": 5, "target_modules": [*QV, *TABLES]}),
    "grown-saved": ("llama", {"rows": 5, "target_modules": QV, "modules_to_save": TABLES}),
    "grown-saved-one": ("llama", {"rows": 5, "target_modules": QV, "modules_to_save": TABLES[:1]}),
    "grown-tied-saved": ("tied", {"rows": 5, "target_modules": QV, "modules_to_save": TABLES[:1]}),
    "grown-tied-saved-together": (
        "tied",
        {
            "rows": 5,
            "target_modules": QV,
            "modules_to_save": TABLES[:1],
            "ensure_weight_tying": True,
        },
    ),
    "shrunk": ("llama", {"rows": -40, "target_modules": QV}),
    "tokens": ("llama", {"target_modules": QV, "trainable_token_indices": [9, 7, 300]}),
    "tokens-tied": ("tied", {"target_modules": QV, "trainable_token_indices": [9, 7]}),
    "tokens-of-both": (
        "biased",
        {
            "target_modules": QV,
            "trainable_token_indices": {"embed_tokens": [9, 7], "lm_head": [3]},
        },
    ),
    "tokens-grown": (
        "tied",
        {"rows": 3, "target_modules": QV, "trainable_token_indices": [301, 302, 303]},
    ),
    "tokens-grown-untied": (
        "llama",
        {"rows": 3, "target_modules": QV, "trainable_token_indices": [301, 302, 303]},
    ),
    "lora-bias": ("biased", {"target_modules": QV, "lora_bias": True}),
    "bias-all": ("biased", {"target_modules": QV, "bias": "all"}),
    "bias-lora-only": ("biased", {"target_modules": QV, "bias": "lora_only"}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.o_proj": 3, r".*\.0\.mlp.*": 5},
            "alpha_pattern": {"v_proj": 11, "^model.layers.0.self_attn.k_proj": 1.5},
            "use_rslora": True,
        },
    ),
    "dora": ("llama", {"target_modules": [*LINEAR, *TABLES], "use_dora": True}),
    "dora-biased": ("biased", {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}),
    "dora-grown": ("llama", {"rows": 5, "target_modules": [*QV, *TABLES], "use_dora": True}),
    "pissa": ("llama", {"target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "pissa-head": (
        "biased",
        {"target_modules": ["lm_head", "embed_tokens", "q_proj"], "init_lora_weights": "pissa"},
    ),
    "pissa-dora": (
        "llama",
        {"target_modules": ["o_proj"], "init_lora_weights": "pissa", "use_dora": True},
    ),
    "pissa-rslora-patterns": (
        "llama",
        {
            "target_modules": QV,
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"v_proj": 7},
        },
    ),
    "olora": ("biased", {"target_modules": LINEAR, "init_lora_weights": "olora"}),
    "eva": ("llama", {"target_modules": QV, "init_lora_weights": "eva"}),
    "orthogonal": ("llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": QV, "init_lora_weights": "mica"}),
    "gaussian": ("llama", {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "random": ("llama", {"target_modules": QV, "init_lora_weights": False}),
}
"""Model, and what its adapter is; `rows` are added to its tables before."""

UNTIED_BY_US = {
    "embedding": {"target_modules": [*QV, "embed_tokens"]},
    "head": {"target_modules": [*QV, "lm_head"]},
    "both": {"target_modules": [*QV, *TABLES]},
    "grown": {"target_modules": [*QV, "embed_tokens"], "rows": 4},
}
"""Adapters of one of two tied tables. PEFT's merge_and_unload changes both, so that its result is
not what it computed before; right is what it computed."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    write_models(folder)
    return folder


@pytest.mark.parametrize("case", LIKE_PEFT)
def test_merged_is_what_peft_merges(root: Path, tmp_path: Path, case: str) -> None:
    model, settings = LIKE_PEFT[case]
    rows = settings.get("rows", 0)
    folder = make(root / model, tmp_path / "adapter", **settings)
    found = base_model(merge(root / model, folder, tmp_path / "merged"))
    expected = reload(root / model, folder, rows).merge_and_unload()
    assert found.config.vocab_size == MODELS[model][1]["vocab_size"] + rows
    assert found.config.tie_word_embeddings == expected.config.tie_word_embeddings
    theirs, base = expected.state_dict(), base_model(root / model).state_dict()
    changed = 0
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5, msg=name)
        same = tensor.shape == base[name].shape and torch.equal(tensor, base[name])
        changed += not same
    assert changed
    difference = (logits(found) - logits(expected)).abs().max()
    assert difference <= 1e-5 * logits(expected).abs().max()


@pytest.mark.parametrize("case", UNTIED_BY_US)
def test_an_adapter_of_one_tied_table_unties_them(root: Path, tmp_path: Path, case: str) -> None:
    settings = UNTIED_BY_US[case]
    folder = make(root / "tied", tmp_path / "adapter", **settings)
    found = base_model(merge(root / "tied", folder, tmp_path / "merged"))
    assert not found.config.tie_word_embeddings
    expected = logits(reload(root / "tied", folder, settings.get("rows", 0)))
    assert (logits(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_tied_factors_of_both_tables_stay_tied(root: Path, tmp_path: Path) -> None:
    options = {"target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True}
    folder = make(root / "tied", tmp_path / "adapter", **options)
    found = base_model(merge(root / "tied", folder, tmp_path / "merged"))
    assert found.config.tie_word_embeddings
    expected = logits(reload(root / "tied", folder))
    assert (logits(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


REFUSED_STARTS: dict[str, str] = {
    "pissa_niter_4": "pissa_niter_4",
    "corda": "corda",
    "loftq": "loftq",
    "lora_ga": "lora_ga",
}


@pytest.mark.parametrize("start", REFUSED_STARTS)
def test_bases_that_peft_cannot_find_again_are_refused(
    root: Path, tmp_path: Path, start: str
) -> None:
    folder = make(root / "llama", tmp_path / "adapter", target_modules=QV)
    edit_config(folder, init_lora_weights=start)
    with pytest.raises(UserError, match=f"{start}.*path_initial_model_for_weight_conversion"):
        merge(root / "llama", folder, tmp_path / "merged")


def test_a_converted_pissa_adapter_is_a_plain_one(root: Path, tmp_path: Path) -> None:
    """What the refusals advise: PEFT's conversion to an adapter of the plain base."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=QV, init_lora_weights="pissa")
    peft = get_peft_model(base_model(root / "llama"), config)
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(tmp_path / "start")
    peft.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.2
    options = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
    peft.save_pretrained(tmp_path / "adapter", **options)
    merged = merge(root / "llama", tmp_path / "adapter", tmp_path / "merged")
    expected = logits(peft)
    assert (logits(base_model(merged)) - expected).abs().max() <= 1e-5 * expected.abs().max()


MEANT: dict[str, Any] = {
    "layer_replication": [[0, 1]],
    "fan_in_fan_out": True,
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "kasa_config": {"beta": 1.0},
    "invented_by_a_later_peft": "x",
}


@pytest.mark.parametrize("key", MEANT)
def test_keys_that_mean_something_unknown_are_refused(root: Path, tmp_path: Path, key: str) -> None:
    folder = make(root / "llama", tmp_path / "adapter", target_modules=QV)
    edit_config(folder, **{key: None})
    merge(root / "llama", folder, tmp_path / "merged")
    edit_config(folder, **{key: MEANT[key]})
    with pytest.raises(UserError, match=key):
        merge(root / "llama", folder, tmp_path / "again")


WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "unknown tensor": (
        {},
        lambda t: t | {"base_model.model.model.layers.0.self_attn.x_proj.weight": torch.ones(2)},
        "x_proj",
    ),
    "half a pair": (
        {},
        lambda t: {k: v for k, v in t.items() if "0.self_attn.q_proj.lora_A" not in k},
        "q_proj.lora_B",
    ),
    "another layer": (
        {},
        lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()},
        "layers.7",
    ),
    "another rank": ({"r": 5}, dict, "rank 5"),
    "another size": (
        {},
        lambda t: {k: v[:, :-1] if "q_proj.lora_A" in k else v for k, v in t.items()},
        "q_proj",
    ),
    "magnitudes": ({"use_dora": True}, dict, "lora_magnitude_vector"),
    "unsaid magnitudes": (
        {},
        lambda t: (
            t
            | {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": (
                    torch.ones(48)
                )
            }
        ),
        "lora_magnitude_vector",
    ),
    "a module without values": ({"modules_to_save": ["norm"]}, dict, "norm"),
    "a bias without a base": (
        {"lora_bias": True},
        lambda t: (
            t | {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(48)}
        ),
        "q_proj.bias",
    ),
    "another method": ({"peft_type": "LOHA"}, dict, "LOHA"),
    "no rank": ({"r": "many"}, dict, "r "),
    "no expression": ({"rank_pattern": {"(": 3}}, dict, "rank_pattern"),
}


@pytest.mark.parametrize("case", WRONG)
def test_folders_that_do_not_fit_are_refused_by_name(root: Path, tmp_path: Path, case: str) -> None:
    config, change, named = WRONG[case]
    folder = make(root / "llama", tmp_path / "adapter", target_modules=QV)
    edit_config(folder, **config)
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=named):
        merge(root / "llama", folder, tmp_path / "merged")


def test_tensors_in_a_pickle_are_refused(root: Path, tmp_path: Path) -> None:
    folder = make(root / "llama", tmp_path / "adapter", target_modules=QV)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin.*save_pretrained"):
        merge(root / "llama", folder, tmp_path / "merged")


@pytest.mark.parametrize(("tables", "saved"), [(TABLES, False), (TABLES[1:], True)])
def test_tables_without_the_added_rows_are_refused(
    root: Path, tmp_path: Path, tables: list[str], saved: bool
) -> None:
    """Factors for rows whose base nobody stored; PEFT itself stores no table beside another's."""
    options: dict[str, Any] = {"rows": 5, "target_modules": tables}
    save = {"save_embedding_layers": saved}
    folder = make(root / "llama", tmp_path / "adapter", save=save, **options)
    with pytest.raises(UserError, match=r"301 rows in the model.*306.*save_embedding_layers=True"):
        merge(root / "llama", folder, tmp_path / "merged")


def test_everything_stored_is_used(root: Path, tmp_path: Path) -> None:
    """A base table beside factors counts: changed, it changes the merged one as in PEFT."""
    folder = make(root / "llama", tmp_path / "adapter", target_modules=["lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in load_file(folder / "adapter_model.safetensors")
    edit_tensors(folder, lambda tensors: tensors | {key: tensors[key] * 2})
    found = base_model(merge(root / "llama", folder, tmp_path / "merged"))
    expected = reload(root / "llama", folder).merge_and_unload()
    torch.testing.assert_close(found.lm_head.weight, expected.lm_head.weight, rtol=1e-5, atol=1e-5)
