"""Losses of pairs against their papers' formulas, written in plain Python, and their slopes."""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from swiftmeg.args.commands import RlhfArguments
from swiftmeg.args.flags import parse_flags
from swiftmeg.args.preference import Divergence, LossType
from swiftmeg.args.preference_rules import DIVERGENT, SMOOTHED, settle_preference
from swiftmeg.args.resolve import resolve
from swiftmeg.trainers.dpo_losses import (
    LOSSES,
    Objective,
    PairSums,
    answer_weight,
    gradients,
    pair_losses,
    pair_metrics,
)

BETA, TAU, ALPHA = 0.3, 0.4, 0.7
TYPES = [name for name in get_args(LossType) if name != "aot_pair"]


class Plain(NamedTuple):
    """A pair: log-probabilities of chosen and rejected answer, the reference's, tokens."""

    chosen: float
    rejected: float
    ref_chosen: float
    ref_rejected: float
    chosen_tokens: int
    rejected_tokens: int
    nll: float
    weight: float


def plain_pairs(count: int = 5) -> list[Plain]:
    draw = random.Random(3)
    logps = [[-draw.uniform(1, 9) for _ in range(4)] for _ in range(count)]
    return [
        Plain(*each, draw.randint(1, 7), draw.randint(1, 7), -each[0], draw.uniform(0.2, 1))
        for each in logps
    ]


def tensors(pairs: list[Plain], weighted: bool = False) -> PairSums:
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)]
    return PairSums(*columns[:7], weights=columns[7] if weighted else None)


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sig(x: float) -> float:
    return -math.log(1 + math.exp(-x))


DERIVATIVES: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda t: math.log(t),
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: math.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (t ** (ALPHA - 1) - 1) / (ALPHA - 1),
}
"""f'(t), up to a constant, of t = model / reference."""


def paper_losses(pairs: list[Plain], name: str, e: float, divergence: str) -> list[float]:
    """One loss type for every pair, for the sorted ones for every place in the order."""
    score = DERIVATIVES[divergence]
    a = [math.log(math.exp(p.chosen) / math.exp(p.ref_chosen)) for p in pairs]
    b = [math.log(math.exp(p.rejected) / math.exp(p.ref_rejected)) for p in pairs]
    sc, sr = ([score(math.exp(x)) for x in side] for side in (a, b))

    def cdpo(margin: float) -> float:
        return -(1 - e) * log_sig(margin) - e * log_sig(-margin)

    if name == "sft":
        tokens = sum(p.chosen_tokens for p in pairs)
        return [len(pairs) * p.nll / tokens for p in pairs]  # whose mean is one over tokens
    if name == "aot":
        model = sorted(p.chosen - p.rejected for p in pairs)
        reference = sorted(p.ref_chosen - p.ref_rejected for p in pairs)
        return [cdpo(BETA * (x - y)) for x, y in zip(model, reference, strict=True)]
    if name == "aot_unpaired":
        return [cdpo(BETA * (x - y)) for x, y in zip(sorted(a), sorted(b), strict=True)]

    def one(p: Plain, a: float, b: float, sc: float, sr: float) -> float:
        d = BETA * (sc - sr)
        per_token = sc / p.chosen_tokens - sr / p.rejected_tokens
        if name == "sigmoid":
            return cdpo(d)
        if name == "hinge":
            return max(0.0, 1 - d)
        if name == "ipo":
            return (per_token - 1 / (2 * BETA)) ** 2
        if name == "exo_pair":
            return sig(d) * math.log(sig(d) / (1 - e)) + sig(-d) * math.log(sig(-d) / e)
        if name == "nca_pair":
            return -log_sig(BETA * a) - 0.5 * (log_sig(-BETA * a) + log_sig(-BETA * b))
        if name == "robust":
            return ((1 - e) * -log_sig(d) - e * -log_sig(-d)) / (1 - 2 * e)
        if name == "bco_pair":
            return -log_sig(BETA * a) - log_sig(-BETA * b)
        if name == "sppo_hard":
            return (a - 1 / (2 * BETA)) ** 2 + (b + 1 / (2 * BETA)) ** 2
        if name == "apo_zero":
            return (1 - sig(BETA * a)) + sig(BETA * b)
        if name == "apo_down":
            return sig(BETA * a) + (1 - sig(BETA * (a - b)))
        if name == "discopop":
            share = sig(d / TAU)
            return (1 - share) * -log_sig(d) + share * math.exp(-d)
        assert name == "sigmoid_norm"
        return -log_sig(BETA * per_token)

    return [one(*values) for values in zip(pairs, a, b, sc, sr, strict=True)]


def objective(*terms: tuple[str, float], **options: Any) -> Objective:
    return Objective(terms, **({"beta": BETA, "tau": TAU, "alpha": ALPHA} | options))


CASES = [
    pytest.param(name, e, divergence, id=f"{name}-{e}-{divergence}")
    for name in TYPES
    for e in ((0.0, 0.1) if name in SMOOTHED else (0.0,))
    for divergence in (get_args(Divergence) if name in DIVERGENT else ("reverse_kl",))
    if (name, e) != ("exo_pair", 0.0)
]


@pytest.mark.parametrize(("name", "e", "divergence"), CASES)
def test_a_loss_is_its_papers(name: str, e: float, divergence: str) -> None:
    pairs = plain_pairs()
    found = pair_losses(
        tensors(pairs), objective((name, 1.0), label_smoothing=e, divergence=divergence)
    )
    assert found.tolist() == pytest.approx(paper_losses(pairs, name, e, divergence), rel=1e-12)


@pytest.mark.parametrize(("name", "e", "divergence"), CASES)
def test_its_gradient_is_the_slope(name: str, e: float, divergence: str) -> None:
    pairs = plain_pairs()
    of = objective((name, 1.0), label_smoothing=e, divergence=divergence)
    found = dict(zip(("chosen", "rejected", "nll"), gradients(tensors(pairs), of), strict=True))

    def mean(changed: list[Plain]) -> float:
        losses = paper_losses(changed, name, e, divergence)
        return sum(losses) / len(losses)

    for field, values in found.items():
        for index, value in enumerate(values.tolist()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = pairs[index]._replace(**{field: getattr(pairs[index], field) + step})
                ends.append(mean([*pairs[:index], moved, *pairs[index + 1 :]]))
            assert value == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)


def test_every_loss_type_is_there() -> None:
    assert {*LOSSES, "sft"} == set(TYPES)
    assert len(TYPES) == 15


def test_losses_add_up() -> None:
    """MPO: loss_weights."""
    pairs = plain_pairs()
    terms = [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)]
    expected = [
        sum(weight * loss for (_, weight), loss in zip(terms, losses, strict=True))
        for losses in zip(
            *(paper_losses(pairs, name, 0.0, "reverse_kl") for name, _ in terms), strict=True
        )
    ]
    assert pair_losses(tensors(pairs), objective(*terms)).tolist() == pytest.approx(expected)


def part(sums: PairSums, start: int, end: int | None = None) -> PairSums:
    return PairSums(*(None if each is None else each[start:end] for each in sums))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TYPES)
def test_a_batch_in_parts_is_the_batch(name: str) -> None:
    sums = tensors(plain_pairs())
    of = objective((name, 1.0), label_smoothing=0.1 if name in SMOOTHED else 0.0)
    whole = pair_losses(sums, of).mean()
    mean_tokens = float(sums.chosen_tokens.mean())
    if of.needs_whole_batch:
        with pytest.raises(ValueError, match="whole batch"):
            pair_losses(sums, of, mean_tokens)
        # What `gradients` is for: products with numbers have the whole batch's gradient.
        chosen = sums.chosen.clone().requires_grad_()
        pair_losses(sums._replace(chosen=chosen), of).mean().backward()
        torch.testing.assert_close(chosen.grad, gradients(sums, of)[0])
        return
    split = [pair_losses(part(sums, *ends), of, mean_tokens) for ends in ((0, 2), (2, None))]
    torch.testing.assert_close(torch.cat(split).mean(), whole)


def test_pairs_are_weighted() -> None:
    """WPO: use_weighting."""
    pairs = plain_pairs()
    losses = paper_losses(pairs, "hinge", 0.0, "reverse_kl")
    expected = [pair.weight * loss for pair, loss in zip(pairs, losses, strict=True)]
    of = objective(("hinge", 1.0), weighted=True)
    assert pair_losses(tensors(pairs, weighted=True), of).tolist() == pytest.approx(expected)


def test_an_answers_weight() -> None:
    """exp of the mean over tokens of log p_t - log sum_v p_v^2."""
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    chosen = torch.tensor([0, 2])
    log_probs = probabilities[torch.arange(2), chosen].log().sum()[None].requires_grad_()
    collisions = (probabilities**2).sum(1).log().sum()[None]
    weight = answer_weight(log_probs, collisions, torch.tensor([2]))
    expected = math.sqrt(0.7 / (0.49 + 0.04 + 0.01) * 0.4 / (0.09 + 0.09 + 0.16))
    assert weight.item() == pytest.approx(expected)
    assert not weight.requires_grad


def test_metrics() -> None:
    pairs = plain_pairs()
    found = {name: values.tolist() for name, values in pair_metrics(tensors(pairs), BETA).items()}
    rewards = [
        (BETA * (p.chosen - p.ref_chosen), BETA * (p.rejected - p.ref_rejected)) for p in pairs
    ]
    expected = {
        "rewards/chosen": [c for c, _ in rewards],
        "rewards/rejected": [r for _, r in rewards],
        "rewards/accuracies": [float(c > r) for c, r in rewards],
        "rewards/margins": [c - r for c, r in rewards],
        "logps/chosen": [p.chosen for p in pairs],
        "logps/rejected": [p.rejected for p in pairs],
    }
    assert {*found} == {*expected}
    for name, values in expected.items():
        assert found[name] == pytest.approx(values)


def test_flags_make_the_objective() -> None:
    words = (
        "--beta 0.2 --loss_type robust discopop --loss_weights 2 0.5 --label_smoothing 0.1 "
        "--discopop_tau 0.3 --f_divergence_type alpha_divergence --f_alpha_divergence_coef 0.9 "
        "--use_weighting true --rpo_alpha 0.4"
    )
    args, sources = resolve(RlhfArguments, parse_flags(RlhfArguments, words.split(), "rlhf"), [])
    settle_preference(args, sources)
    assert Objective.of(args) == Objective(
        terms=(("robust", 2.0), ("discopop", 0.5), ("sft", 0.4)),
        beta=0.2,
        label_smoothing=0.1,
        divergence="alpha_divergence",
        alpha=0.9,
        tau=0.3,
        weighted=True,
    )


def test_the_limit_of_alpha_divergence() -> None:
    sums = tensors(plain_pairs())
    near: list[Tensor] = [
        pair_losses(sums, objective(("hinge", 1.0), divergence="alpha_divergence", alpha=alpha))
        for alpha in (1.0, 1 + 1e-5)
    ]
    torch.testing.assert_close(near[0], pair_losses(sums, objective(("hinge", 1.0))))
    torch.testing.assert_close(near[1], near[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TYPES)
def test_extremes_are_finite(name: str) -> None:
    """An answer without a token, as fillers have, and log-ratios of hundreds."""
    zero = torch.zeros(2)
    far = torch.tensor([300.0, -300.0])
    of = objective((name, 1.0), label_smoothing=0.1)
    empty = PairSums(zero, zero, zero, zero, zero, zero, zero)
    answers = PairSums(
        -far.abs(), -far.abs() + far / 9, -far.abs(), zero, far.abs(), far.abs(), far.abs()
    )
    for sums in (empty, answers):
        assert pair_losses(sums, of).isfinite().all()
        assert all(each.isfinite().all() for each in gradients(sums, of))
