"""Adapters leave as PEFT folders and come back; merged they are what they were beside the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.matrix.mutations import merge_without_scale
from tests.ranks import run_ranks
from tests.references import relative, transformers_loss
from tests.runs import PIPELINE, SEQUENCE, TENSOR, command, export, load_folder, words
from tests.tuners.lora_runs import MODELS, TUNERS, adapters, train, write_inputs

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tied": (2, PIPELINE),
    "moe": (2, {"expert_model_parallel_size": 2}),
}
"""Models whose commands are run; test_adapters_every_family.py has every kind
of model in every layout."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = {model: MODELS[model] for model in LAYOUTS}
    folder = write_inputs(tmp_path_factory.mktemp("adapters"), models)
    for model in models:
        steps = {"train_iters": 3, "lr": 2e-2} | TUNERS[model]
        train(folder, model, f"{model}-lora", 2, **SEQUENCE, **steps)
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 70)[None] % 1003
    with torch.no_grad():
        return model.eval()(ids).logits


def base_model(work: Path, model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work / model, dtype=torch.float32)


def peft_model(work: Path, model: str) -> Any:
    from peft import PeftModel

    folder = work / f"{model}-lora" / "iter_0000003-hf"
    return PeftModel.from_pretrained(base_model(work, model), folder)


@pytest.mark.parametrize("model", LAYOUTS)
def test_peft_reads_every_tensor_and_writes_the_same(work: Path, model: str) -> None:
    ours = adapters(work, f"{model}-lora", 3)
    peft = peft_model(work, model)
    live = {
        name.replace(".default", "").replace(".modules_to_save", ""): tensor
        for name, tensor in peft.state_dict().items()
    }
    assert [name for name, tensor in ours.items() if not torch.equal(live[name], tensor)] == []
    peft.save_pretrained(work / f"{model}-again", save_embedding_layers=False)
    again = load_file(work / f"{model}-again" / "adapter_model.safetensors")
    assert again.keys() == ours.keys()
    assert [name for name in ours if not torch.equal(again[name], ours[name])] == []
    assert (logits(peft) - logits(base_model(work, model))).abs().max() > 0.1


@pytest.mark.parametrize("model", LAYOUTS)
def test_merged_models_compute_what_adapters_did(work: Path, model: str) -> None:
    """The same bits whether Megatron merges a checkpoint or a PEFT folder is merged on the way."""
    world, layout = LAYOUTS[model]
    trained = work / f"{model}-lora"
    checked = {"test_convert_precision": "true"}
    merged = export(
        work / f"{model}-merged", world, mcore_adapters=trained, to_hf="true", **layout, **checked
    )
    expected = logits(peft_model(work, model))
    assert (logits(base_model(work, f"{model}-merged")) - expected).abs().max() <= 1e-4

    folder = trained / "iter_0000003-hf"
    also = export(work / f"{model}-folder", adapters=folder, merge_lora="true", **checked)
    one, other = load_folder(merged), load_folder(also)
    assert one.keys() == other.keys() == load_folder(work / model).keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)


def export_without_scale(argv: list[str]) -> None:
    """`swift export` that adds B @ A as it is."""
    merge_without_scale()
    command("export", argv)


def test_a_wrong_merge_is_refused_and_leaves_nothing(work: Path) -> None:
    command = {
        "mcore_adapters": work / "tied-lora",
        "to_hf": "true",
        "output_dir": work / "wrong",
        "test_convert_precision": "true",
    }
    with pytest.raises(RuntimeError, match="the merged model and the model with its adapters"):
        run_ranks(1, export_without_scale, words(command))
    assert not (work / "wrong").exists()


def test_other_ways_out(work: Path) -> None:
    """A PEFT folder from the checkpoint, and merged weights as a Megatron checkpoint."""
    trained = work / "tied-lora"
    folder = export(
        work / "peft", 2, mcore_adapters=trained, to_hf="true", merge_lora="false", **TENSOR
    )
    written = load_file(folder / "adapter_model.safetensors")
    ours = adapters(work, "tied-lora", 3)
    assert [name for name in ours if not torch.equal(written[name], ours[name])] == []
    mcore = export(work / "mcore", mcore_adapters=trained, to_mcore="true")
    back = export(work / "back", mcore_model=mcore, to_hf="true")
    expected = logits(peft_model(work, "tied"))
    assert (logits(base_model(work, back.name)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("model", LAYOUTS)
def test_training_starts_from_a_folder(work: Path, model: str) -> None:
    """A step without a learning rate leaves the same bits, and has PEFT's loss."""
    world, layout = LAYOUTS[model]
    start = work / f"{model}-lora" / "iter_0000003-hf"
    name = f"{model}-started"
    plain = {"train_iters": 1, "lr": 0, "weight_decay": 0, "lora_rank": 4, **layout}
    if model == "tied":
        plain["lora_alpha"] = 6
    (line,) = train(work, model, name, world, adapters=start, **plain)
    ours = adapters(work, name, 1)
    theirs = load_file(start / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    with torch.no_grad():
        loss = transformers_loss(peft_model(work, model).eval(), work / model).item()
    assert relative(line["lm loss"], loss) <= 1e-5


def test_a_folder_of_layers_that_megatron_fuses_can_be_merged(work: Path) -> None:
    """q and v alone, with an A each, as PEFT trains them: merged exactly, not trained on."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    peft = get_peft_model(base_model(work, "tied"), config)
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = work / "foreign"
    peft.save_pretrained(folder)
    export(work / "foreign-merged", adapters=folder, model=work / "tied", merge_lora="true")
    found, expected = logits(base_model(work, "foreign-merged")), logits(peft)
    assert (found - expected).abs().max() <= 1e-4
    assert (expected - logits(base_model(work, "tied"))).abs().max() > 0.1
    with pytest.raises(RuntimeError, match=r"the adapter has no factors for .*k_proj"):
        train(work, "tied", "foreign-started", adapters=folder, lora_rank=3, lora_alpha=5)


def test_infer_puts_the_adapter_beside_the_model(work: Path, monkeypatch: Any) -> None:
    from swiftmeg.args.infer import InferArguments
    from swiftmeg.cli import infer

    engines = []

    def keep(args: InferArguments, folder: Path) -> None:
        from swiftmeg.inference.engine import Engine

        engines.append(Engine(args, folder))

    monkeypatch.setattr(infer, "_run", keep)
    infer.main(words({"adapters": work / "tied-lora" / "iter_0000003-hf", "temperature": 0}))
    (engine,) = engines
    assert torch.equal(logits(engine.model), logits(peft_model(work, "tied")))
    question = engine.prompt([{"role": "user", "content": "question 1"}])
    assert engine.answer([question])
