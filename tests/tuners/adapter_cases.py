"""Adapters beside a tiny model of each kind, one process group a layout: what ranks run."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from swiftmeg.models.family import REGISTRY
from tests.families.conversion import Layout, build
from tests.families.specimens import ALL, SPECIMENS

KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "target_modules": ["all-linear", "all-embedding", "output_layer"],
        "lora_bias": "all",
    },
    # softmax scores, a shared expert and its gate
    "qwen2_moe": {"target_modules": ["all-linear", "all-router"], "modules_to_save": ["router"]},
    "mixtral": {"target_modules": ["all-linear", "all-router"], "use_rslora": True},
    # sigmoid scores with a bias, dense layers before those of experts
    "glm4_moe": {"target_modules": ["all-linear"], "modules_to_save": ["router", "output_layer"]},
    # gated delta nets and gated attention
    "qwen3_next": {"target_modules": ["all-linear"], "modules_to_save": ["conv1d"]},
    # latent attention
    "deepseek_v3": {"target_modules": ["all-linear", "all-router"]},
    # experts with biases, which have no adapters
    "gpt_oss": {"target_modules": ["linear_qkv", "linear_proj", "all-router"]},
}
"""Specimens of tests.families, and what is adapted in them."""

UNREADABLE = {"mimo", "deepseek"}
"""transformers has no class for them; their layers are those of others."""

OTHERS: dict[str, dict[str, Any]] = {
    kind: {"target_modules": ["all-linear", "all-router"] if ALL[kind].experts else ["all-linear"]}
    for architecture in REGISTRY.families
    for kind in list(SPECIMENS.get(architecture, (architecture,)))[:1]
    if not {*SPECIMENS.get(architecture, ())} & (KINDS.keys() | UNREADABLE)
}
"""A specimen of every other family; these are adapted in the first layout only."""

LAYOUTS = {
    "tp2": Layout(2, tensor=2),
    "pp2": Layout(2, pipeline=2),
    "ep2": Layout(2, expert=2),
}
"""The first one makes the adapters; the others read them."""


def arguments(kind: str, folder: Path) -> Any:
    """The flags of a run that trains these adapters."""
    from swiftmeg.args.tuner import LoraArguments

    flags = {"train_type": "lora", "lora_rank": 3, "lora_alpha": 7} | (KINDS | OTHERS)[kind]
    prompting = {"template": None, "system": None}
    adapters = asdict(LoraArguments(**flags))
    return SimpleNamespace(**adapters, **prompting, model=str(folder), load=None)


@torch.no_grad()
def adapt(root: Path, out: Path, kind: str, layout: str) -> Any:
    """Attach, write as a PEFT folder, merge and write again; returns the logits with adapters.

    `root` has the model; adapters and merged model go to folders of `out`.
    """
    from swiftmeg.export.hf_files import HFWeights
    from swiftmeg.export.hf_reader import HFSupply, load_hf
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.lazy_weights import OnDemand
    from swiftmeg.export.precision import mcore_logits
    from swiftmeg.tuners.adapters import attach, attached
    from swiftmeg.tuners.hf_form import fill_adapters
    from swiftmeg.tuners.merge import Merging
    from swiftmeg.tuners.peft_folder import save_peft
    from swiftmeg.tuners.peft_reader import read_adapters

    folder = root / kind
    args = arguments(kind, folder)
    model, models, dims = build(folder, LAYOUTS[layout])
    load_hf(models, folder, model.family, model.config, dims)
    attach(models, args, seed=3)
    first = next(iter(LAYOUTS))
    if layout == first:
        torch.manual_seed(torch.distributed.get_rank())
        for each in attached(models):
            for factor in (each.adapter.A, each.adapter.B):
                factor.weight.normal_(0.0, 0.2)
                if factor.axis is None:
                    torch.distributed.broadcast(factor.weight, 0, group=each.adapter.group)
        for chunk in models:
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.mul_(1.25)
    else:
        _, adapters = read_adapters(out / f"{kind}-{first}", model)
        fill_adapters(models, adapters, model.family, model.config, dims)
    save_peft(models, out / f"{kind}-{layout}", args, model, dims)
    ids = torch.load(folder / "expected.pt")["ids"]
    logits = mcore_logits(models, ids, dims.vocab_size)
    common = model.family, model.config, dims
    base = HFSupply(HFWeights(folder, model.config), *common)
    weights = OnDemand(models, Merging(models, base))
    target = out / f"{kind}-{layout}-merged"
    save_hf(models, target, folder, *common, dtype=torch.float32, weights=weights)
    return None if logits is None else logits.numpy()


def adapt_all(root: str, out: str, kinds: list[str], layout: str) -> list[Any]:
    """`adapt` for each kind."""
    return [adapt(Path(root), Path(out), kind, layout) for kind in kinds]
