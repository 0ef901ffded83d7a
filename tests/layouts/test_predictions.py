"""Multi-token prediction trains as its paper says (arXiv:2412.19437, section 2.2).

The reference stands here, in torch, around layers of transformers, which leaves the modules out:
for the token at i and k modules, module k joins the normed output for i of the one before (the
decoder is the first of all) with the normed embedding of the token at i + k, projects both to the
model's width, and sends them through a layer, a norm and the model's head to predict the token at
i + k + 1. Each module's cross entropies are divided by as many tokens as the decoder's.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, linear, rms_norm

from tests.references import distance, relative, rows, unstacked, write_rows
from tests.runs import BALANCED, DESCENT, EXPERT, TENSOR, load_folder, train_steps
from tests.sizes import EXPERTS as MODELS
from tests.tiny import save_model

DECODER = 3
PARTS = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
MIMO = dict(zip(PARTS, ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")))
SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v3": MODELS["deepseek_v3"][1],
    "qwen2": {"num_attention_heads": 6, "num_key_value_heads": 2},
}
"""Families of the layers that are in the modules."""

LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one": ("deepseek_v3", 1, {}),
    "padded": ("deepseek_v3", 1, {"micro_batch_size": 4, "padding_free": "false"}),
    "packed": ("deepseek_v3", 1, {"packing": "true", "max_length": 4096, "global_batch_size": 1}),
    "tp2-ep2": ("deepseek_v3", 2, TENSOR | EXPERT | {"expert_tensor_parallel_size": 1}),
    "pp2": ("deepseek_v3", 2, {
        "pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 2,
    }),
    "cp2": ("deepseek_v3", 2, {"context_parallel_size": 2, "micro_batch_size": 4}),
    "mimo": ("qwen2", 1, {"micro_batch_size": 4, "mtp_loss_scaling_factor": 0.4}),
    "mimo-tp2-pp2-full-recompute": ("qwen2", 4, TENSOR | {
        "pipeline_model_parallel_size": 2,
        "decoder_first_pipeline_num_layers": 2,
        "sequence_parallel": "false",
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as published, beside transformers' with one more layer and the module's parts."""
    folder = tmp_path_factory.mktemp("predictions")
    write_rows(folder)
    for name, sizes in SIZES.items():
        layers = folder / f"{name}-layers"
        save_model(layers, name, **sizes | {"num_hidden_layers": DECODER + 1})
        write_module(layers)
        publish(layers, folder / name, name)
    return folder


def write_module(folder: Path) -> None:
    """Beside the layers of a folder, what joins the last of them to the decoder."""
    size = load_folder(folder)["model.norm.weight"].shape[0]
    torch.manual_seed(5)
    parts = {name: 1 + 0.3 * torch.randn(size) for name in PARTS}
    parts["eh_proj"] = torch.randn(size, 2 * size) / size
    save_file(parts, folder / "module.pt")


def publish(layers: Path, folder: Path, name: str) -> None:
    """The model as DeepSeek or, for qwen2, as Xiaomi (MiMo) publishes it."""
    shutil.copytree(layers, folder)
    parts = load_file(layers / "module.pt")
    tensors = as_unstacked(name, load_folder(layers), parts)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((layers / "config.json").read_text())
    config |= {"num_hidden_layers": DECODER, "num_nextn_predict_layers": 1}
    config.pop("num_mtp_layers", None)
    config.pop("layer_types", None)
    if name == "qwen2":
        config |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo"}
    (folder / "config.json").write_text(json.dumps(config))


def as_unstacked(
    name: str, tensors: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`parts` under their published names beside `tensors`, the module's layer renamed."""
    prefix = f"model.layers.{DECODER}."
    if name == "deepseek_v3":
        return tensors | {f"{prefix}{part}.weight": each for part, each in parts.items()} | {
            prefix + "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
            prefix + "shared_head.head.weight": tensors["lm_head.weight"].clone(),
        }  # fmt: skip
    new = "model.mtp_layers.0."
    renamed = {key.replace(prefix, new): each for key, each in tensors.items()}
    parts = parts | {"eh_proj": torch.cat(parts["eh_proj"].chunk(2, dim=1)[::-1], dim=1)}
    return renamed | {f"{new}{MIMO[part]}.weight": each for part, each in parts.items()}


_references: dict[Any, Any] = {}


def reference(work: Path, name: str, factor: float) -> Any:
    """Losses of decoder and module per label, and the gradients by their published names."""
    if (name, factor) not in _references:
        _references[name, factor] = compute_reference(work / f"{name}-layers", name, factor)
    return _references[name, factor]


def compute_reference(
    folder: Path, name: str, factor: float
) -> tuple[float, float, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swiftmeg.data.template.template import Template

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parts = {key: each.requires_grad_() for key, each in load_file(folder / "module.pt").items()}
    template = Template(AutoTokenizer.from_pretrained(folder))
    sums, counts = [torch.zeros(()), torch.zeros(())], [0, 0]
    for row in rows(20):
        encoded = template.encode(row)
        ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["labels"])
        for k, logits in enumerate(both_logits(model, parts, ids, after_norm=name != "qwen2")):
            wanted = labels[1 + k :]
            assert logits.shape[0] == wanted.shape[0]
            sums[k] = sums[k] + cross_entropy(logits, wanted, reduction="sum")
            counts[k] += int((wanted != -100).sum())
    ((sums[0] + factor * sums[1]) / counts[0]).backward()
    gradients = unstacked({key: each.grad for key, each in model.named_parameters()})
    grads = {key: each.grad for key, each in parts.items()}
    losses = [float(total.detach()) / count for total, count in zip(sums, counts, strict=True)]
    return losses[0], losses[1], as_unstacked(name, gradients, grads)


def both_logits(
    model: Any, parts: dict[str, torch.Tensor], ids: torch.Tensor, after_norm: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits for the next tokens [t - 1, v], and the module's for those after them [t - 2, v]."""
    eps = model.config.rms_norm_eps
    embedded = model.model.embed_tokens(ids)
    turned = model.model.rotary_emb(embedded, torch.arange(ids.shape[1])[None])

    def layer(hidden: torch.Tensor, number: int) -> torch.Tensor:
        length = hidden.shape[1]
        cut = tuple(each[:, :length] for each in turned)
        mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
        return model.model.layers[number](hidden, attention_mask=mask, position_embeddings=cut)

    hidden = embedded
    for number in range(DECODER):
        hidden = layer(hidden, number)
    normed = model.model.norm(hidden)

    def norm(tensor: torch.Tensor, part: str) -> torch.Tensor:
        return rms_norm(tensor, tensor.shape[-1:], parts[part], eps)

    source = normed if after_norm else hidden
    pair = [norm(embedded[:, 1:], "enorm"), norm(source[:, :-1], "hnorm")]
    predicted = layer(linear(torch.cat(pair, dim=-1), parts["eh_proj"]), DECODER)
    further = norm(predicted, "shared_head.norm")
    return model.lm_head(normed)[0, :-1], model.lm_head(further)[0, :-1]


def step(
    work: Path, model: str, name: str, world: int, flags: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The first step's line in the log, and its gradients by HF name."""
    flags = DESCENT | {"micro_batch_size": 1, "mtp_num_layers": 1} | flags
    (line,) = train_steps(work, model, name, world, flags | {"moe_router_bias_update_rate": 0})
    before, after = load_folder(work / model), load_folder(work / f"{model}-{name}/iter_0000001-hf")
    assert before.keys() == after.keys()
    return line, {key: (before[key] - after[key]) / DESCENT["lr"] for key in before}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_step_is_the_papers(work: Path, layout: str) -> None:
    model, world, flags = LAYOUTS[layout]
    line, found = step(work, model, layout, world, flags)
    loss, further, expected = reference(work, model, flags.get("mtp_loss_scaling_factor", 0.1))
    assert relative(line["lm loss"], loss) <= 1e-5
    assert relative(line["mtp_1 loss"], further) <= 1e-5
    found = {key: each for key, each in found.items() if not key.endswith("correction_bias")}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.norm() > 0, key
        assert distance(found[key], gradient) <= 2e-5, key


def test_routers_losses_do_not_depend_on_the_layout(work: Path) -> None:
    line, expected = step(work, "deepseek_v3", "balanced", 1, BALANCED)
    flags = BALANCED | LAYOUTS["tp2-ep2"][2] | {"micro_batch_size": 4}
    other, found = step(work, "deepseek_v3", "balanced-tp2-ep2", 2, flags)
    names = [key for key in line if key.endswith("loss")]
    assert len(names) == 4
    for key in (*names, "grad_norm"):
        assert relative(line[key], other[key]) <= 1e-6, key
    routers = [key for key in expected if key.endswith("mlp.gate.weight")]
    assert routers
    assert all(expected[key].norm() > 0 for key in routers)
    for key, gradient in expected.items():
        assert torch.equal(gradient, found[key]) or distance(found[key], gradient) <= 1e-5, key


def test_modules_left_out_change_nothing_else(work: Path) -> None:
    (line,) = train_steps(work, "deepseek_v3", "without", 1, DESCENT | {"mtp_num_layers": 0})
    assert relative(line["lm loss"], reference(work, "deepseek_v3", 0.1)[0]) <= 1e-5
    assert "mtp_1 loss" not in line
    before = load_folder(work / "deepseek_v3")
    left = load_folder(work / "deepseek_v3-without" / "iter_0000001-hf")
    assert left.keys() == {key for key in before if f"layers.{DECODER}." not in key}
