"""The losses, their metrics and gradients against those of TRL's own DPOTrainer.

dpo_reference.json has TRL's numbers, see make_dpo_reference.py. Here a plain forward pass of
transformers gives the sums of log-probabilities that the losses take.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from swiftmeg.args.commands import RlhfArguments
from swiftmeg.args.flags import parse_flags
from swiftmeg.args.preference_rules import settle_preference
from swiftmeg.args.resolve import resolve
from swiftmeg.trainers.dpo_losses import (
    Objective,
    PairSums,
    answer_weight,
    pair_losses,
    pair_metrics,
)
from tests.trainers.make_dpo_reference import BETA, CASES, FILE, batches, projection, save_models

REFERENCE = json.loads(FILE.read_text())


def flags(options: dict[str, Any]) -> list[str]:
    """The flags of `megatron rlhf` for arguments of TRL."""
    settings = {"beta": BETA, "rpo_alpha": "null"} | options
    if settings.get("loss_type") == ["sigmoid", "sft"] and "loss_weights" in settings:
        settings |= {"loss_type": "sigmoid", "rpo_alpha": settings.pop("loss_weights")[1]}
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def log_probs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of each token of the answers, 0 elsewhere; and of their collisions (WPO)."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    every = logits.log_softmax(-1)
    mask = batch["completion_mask"][:, 1:]
    taken = every.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return taken * mask, (2 * every).logsumexp(-1) * mask


def pair_sums(
    model: Any, reference: Any, batch: dict[str, Tensor], args: RlhfArguments
) -> PairSums:
    mask = batch["completion_mask"][:, 1:]
    scale = torch.ones(mask.shape)
    if args.ld_alpha is not None:
        shared = torch.stack(mask.sum(1).chunk(2)).amin(0).repeat(2)
        scale[mask.cumsum(1) > shared[:, None]] = args.ld_alpha
    plain, collisions = log_probs(model, batch)
    with torch.no_grad():
        fixed, _ = log_probs(reference, batch)
    weights = answer_weight(plain.sum(1), collisions.sum(1), mask.sum(1)).chunk(2)
    return PairSums(
        *(plain * scale).sum(1).chunk(2),
        *(fixed * scale).sum(1).chunk(2),
        *mask.sum(1).float().chunk(2),
        -plain.sum(1).chunk(2)[0],
        weights[0] * weights[1] if args.use_weighting else None,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_models(tmp_path_factory.mktemp("dpo"))


@pytest.mark.parametrize("name", CASES)
def test_the_first_step_is_that_of_trl(folders: tuple[Path, Path], name: str) -> None:
    expected = REFERENCE["cases"][name]
    given = parse_flags(RlhfArguments, flags(CASES[name]), "megatron rlhf")
    args, sources = resolve(RlhfArguments, given, [])
    settle_preference(args, sources)
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    sums = pair_sums(model, reference, batches(folders[0])[0], args)
    loss = pair_losses(sums, Objective.of(args)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected["losses"][0], rel=1e-5, abs=1e-6)
    for metric, values in pair_metrics(sums, args.beta).items():
        # Rewards are small differences of large sums.
        near = pytest.approx(expected["metrics"][metric], rel=1e-5, abs=5e-6)
        assert values.mean().item() == near
    for key, parameter in model.named_parameters():
        norm, product = expected["gradients"][key]
        assert parameter.grad is not None
        assert parameter.grad.double().norm().item() == pytest.approx(norm, rel=1e-5)
        bound = 1e-5 * norm * parameter.numel() ** 0.5
        assert projection(parameter.grad) == pytest.approx(product, abs=bound)


def test_the_reference_tells_cases_apart() -> None:
    """No two cases have the same gradients, except aot with pairs in order."""
    found: dict[str, str] = {}
    for name, case in REFERENCE["cases"].items():
        found.setdefault(json.dumps(case["gradients"]), name)
    assert len(found) >= len(CASES) - 1
