"""Models with experts train alike in every layout, and as transformers' autograd says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.references import distance, relative, rows, unstacked, write_rows
from tests.runs import BALANCED, DESCENT, EXPERT, TENSOR, load_folder, train_steps
from tests.sizes import ERNIE
from tests.sizes import EXPERTS as MODELS
from tests.tiny import save_model

RATE = 0.01
ONE_STEP = DESCENT | {"moe_router_bias_update_rate": RATE}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batch-2": (1, {"micro_batch_size": 2}),
    "micro-batch-4-padded": (1, {"micro_batch_size": 4, "padding_free": "false"}),
    "ep2": (2, EXPERT | {"moe_shared_expert_overlap": "true"}),
    "ep2-allgather": (2, EXPERT | {"moe_token_dispatcher_type": "allgather",
                                   "recompute_modules": "moe"}),
    "tp2": (2, TENSOR | {"expert_tensor_parallel_size": 1}),
    "etp2": (2, TENSOR | {"micro_batch_size": 2}),
    "tp2-ep2": (2, TENSOR | EXPERT | {"expert_tensor_parallel_size": 1, "padding_free": "false",
                                      "micro_batch_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "ep2-pp2-recompute": (
        4,
        EXPERT | {
            "pipeline_model_parallel_size": 2,
            "decoder_first_pipeline_num_layers": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for name, (family, sizes) in MODELS.items():
        save_model(folder / name, family, **sizes)
    save_model(folder / "ernie4_5_moe", "ernie4_5_moe", **ERNIE)
    write_rows(folder)
    return folder


def gradients(
    work: Path, model: str, name: str, world: int, flags: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The first step's line in the log, and its gradients by HF name."""
    flags = {"micro_batch_size": 1} | flags | ONE_STEP
    (line,) = train_steps(work, model, name, world, flags)
    before = load_folder(work / model)
    after = load_folder(work / f"{model}-{name}" / "iter_0000001-hf")
    return line, {key: (before[key] - after[key]) / ONE_STEP["lr"] for key in before}


_references: dict[str, Any] = {}


def reference(work: Path, model: str) -> Any:
    """One process, one sample a micro-batch, balancing and z-loss."""
    if model not in _references:
        _references[model] = gradients(work, model, "reference", 1, BALANCED)
    return _references[model]


MLA_LAYOUTS = ("micro-batch-4-padded", "ep2-allgather", "tp2", "cp2")
"""Layouts that are tried with the one model; those not named, with the other."""


def cases() -> Iterator[Any]:
    for model in MODELS:
        for layout in LAYOUTS:
            repeats = (layout in MLA_LAYOUTS) != (model == "deepseek_v3")
            yield pytest.param(model, layout, marks=[pytest.mark.exhaustive] if repeats else [])


@pytest.mark.parametrize(("model", "layout"), cases())
def test_first_step_does_not_depend_on_the_layout(work: Path, model: str, layout: str) -> None:
    line, expected = reference(work, model)
    world, flags = LAYOUTS[layout]
    found_line, found = gradients(work, model, layout, world, BALANCED | flags)
    names = [key for key in line if key.endswith("loss")]
    assert len(names) == 3
    for key in (*names, "grad_norm"):
        assert relative(line[key], found_line[key]) <= 1e-6, key
    for key, gradient in expected.items():
        assert gradient.norm() > 0
        if key.endswith("correction_bias"):  # moved by as much for every expert, up or down
            moved = -gradient * ONE_STEP["lr"] / RATE
            assert torch.allclose(moved.abs(), moved.abs().round(), atol=1e-4)
            assert torch.equal(found[key], gradient), key
        else:
            assert distance(found[key], gradient) <= 1e-5, key


EXACT = {
    "deepseek_v3": ("e_score_correction_bias",),
    "ernie4_5_moe": ("e_score_correction_bias", "gate.weight"),
}
"""Ends of the names of tensors that stay in fp32 whatever the model's dtype is."""


@pytest.mark.parametrize("model", EXACT)
def test_routers_stay_exact_in_half_precision(work: Path, model: str) -> None:
    flags = {"torch_dtype": "bfloat16", "lr": 0, "min_lr": 0, "train_iters": 1}
    kept = {"moe_router_bias_update_rate": 0, "save_safetensors": "true", "no_save_optim": "false"}
    train_steps(work, model, "half", 1, flags | kept)
    before = load_folder(work / model)
    after = load_folder(work / f"{model}-half" / "iter_0000001-hf")
    names = [key for key in before if key.endswith(EXACT[model])]
    assert len(names) == 2 * len(EXACT[model])
    for key in names:
        assert not torch.equal(before[key], before[key].bfloat16().float())
        assert torch.equal(after[key], before[key])


GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.5}


def test_balance_over_the_global_batch_does_not_depend_on_the_layout(work: Path) -> None:
    """Its first step counts the experts' shares; from the second on it balances by them."""
    steps = GLOBAL | {"train_iters": 3}
    expected = train_steps(work, "qwen2_moe", "global", 1, steps)
    first, second, _ = (line["global_load_balancing_loss"] for line in expected)
    assert relative(first, 1.0) <= 1e-6  # even shares
    assert second > 1.001
    layout = EXPERT | TENSOR | {"expert_tensor_parallel_size": 1, "micro_batch_size": 2}
    for line, other in zip(
        expected,
        train_steps(work, "qwen2_moe", "global-tp2-ep2", 2, steps | layout),
        strict=True,
    ):
        for key in ("lm loss", "global_load_balancing_loss", "grad_norm"):
            assert relative(line[key], other[key]) <= 1e-4, key


OPTIONS: dict[str, tuple[dict[str, Any], str | None]] = {
    "fp64-router": ({"moe_router_dtype": "fp64"}, "plain"),
    "room-for-all": ({"moe_expert_capacity_factor": 3}, "plain"),
    "drop-the-weak": ({"moe_expert_capacity_factor": 0.5}, None),
    "fill-up": (
        {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": "true"},
        "drop-the-weak",
    ),
    "drop-the-last": (
        {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"},
        None,
    ),
    "sinkhorn": ({"moe_router_load_balancing_type": "sinkhorn"}, None),
}
"""Flags, and what they compute alike; None: like nothing before."""


def test_options_of_the_router(work: Path) -> None:
    flags = {"train_iters": 1, "micro_batch_size": 4}
    (plain,) = train_steps(work, "qwen2_moe", "plain-router", 1, flags)
    losses = {"plain": plain["lm loss"]}
    for name, (option, like) in OPTIONS.items():
        (line,) = train_steps(work, "qwen2_moe", name, 1, flags | option)
        loss = line["lm loss"]
        if like is not None:
            assert relative(loss, losses[like]) <= 1e-6, name
        else:
            assert all(relative(loss, other) > 1e-5 for other in losses.values()), name
            losses[name] = loss


def router_objective(hidden: torch.Tensor, gate: torch.Tensor, config: Any) -> torch.Tensor:
    """What BALANCED adds to the objective for one sample in one layer."""
    sigmoid = config.model_type == "deepseek_v3"
    logits = hidden @ gate.T
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    scores = scores / scores.sum(-1, keepdim=True)
    topk, experts = config.num_experts_per_tok, gate.shape[0]
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(topk).indices, 1.0)
    balance = experts * (chosen.mean(0) / topk * scores.mean(0)).sum()
    z_loss = logits.logsumexp(-1).square().mean()
    return BALANCED["moe_aux_loss_coeff"] * balance + BALANCED["moe_z_loss_coeff"] * z_loss


def transformers_gradients(folder: Path, balanced: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per trained token, and its gradients by the names of safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swiftmeg.data.template.template import Template

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    template = Template(AutoTokenizer.from_pretrained(folder))
    entering: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_pre_hook(
                lambda module, args: entering.append((args[0].flatten(0, -2), module.weight))
            )
    loss, routers, count = torch.zeros(()), torch.zeros(()), 0
    for row in rows(20):
        entering.clear()
        encoded = template.encode(row)
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(encoded["labels"])[1:]
        trained = int((labels != -100).sum())
        loss = loss + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        assert len(entering) == 2
        for hidden, gate in entering:
            routers = routers + trained * router_objective(hidden, gate, model.config)
        count += trained
    ((loss + routers * balanced) / count).backward()
    return loss.item() / count, unstacked({k: p.grad for k, p in model.named_parameters()})


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_first_step_is_that_of_transformers(work: Path, model: str, balanced: bool) -> None:
    if balanced:
        line, found = reference(work, model)
    else:
        line, found = gradients(work, model, "plain", 1, {"micro_batch_size": 4})
    loss, expected = transformers_gradients(work / model, balanced)
    assert relative(line["lm loss"], loss) <= 1e-5
    names = {key for key in found if not key.endswith("correction_bias")}
    assert names == expected.keys()
    for key, gradient in expected.items():
        assert gradient.norm() > 0, key
        assert distance(found[key], gradient) <= 1e-5, key
