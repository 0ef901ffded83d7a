"""Losses of direct preference optimisation (DPO), as functions of sums of log-probabilities.

Tensors are fp32 of shape [pairs] throughout. What a pair needs of its answers are sums over their
tokens, so the functions know nothing of layouts, packs or models. The definitions are those of TRL
1.16, with label smoothing in `sigmoid` as in its older releases.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from swiftmeg.args.preference import PreferenceArguments
from swiftmeg.args.preference_rules import SORTED


class PairSums(NamedTuple):
    """What the losses know of the pairs of a batch; tensors [pairs].

    `chosen`, `rejected`, `ref_chosen` and `ref_rejected` are sums of the answers' log-probabilities
    under the model and the reference (zeros without one). Under LD-DPO tokens beyond the shorter
    answer's length count `ld_alpha` in them, see `PairTemplate`.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_nll: Tensor
    """Minus the chosen answers' log-probabilities, every token counting once."""
    weights: Tensor | None = None
    """Without gradient: the product of both answers' `answer_weight` (WPO), or None for 1."""

    @property
    def chosen_ratio(self) -> Tensor:
        """The log-ratio of model and reference for the chosen answers."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """The log-ratio of model and reference for the rejected answers."""
        return self.rejected - self.ref_rejected


@dataclass(frozen=True)
class Objective:
    """The loss of a run: a weighted sum of loss types."""

    terms: tuple[tuple[str, float], ...]
    """Loss types with their weights; --rpo_alpha is the weight of a last `sft`."""
    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    tau: float = 0.05
    weighted: bool = False
    """Whether pairs have weights (WPO)."""

    @classmethod
    def of(cls, args: PreferenceArguments) -> "Objective":
        """The objective that flags describe, as `settle_preference` leaves them."""
        terms: list[tuple[str, float]] = list(zip(args.loss_type, args.loss_weights, strict=True))
        if args.rpo_alpha is not None:
            terms.append(("sft", args.rpo_alpha))
        return cls(
            terms=tuple(terms),
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            divergence=args.f_divergence_type,
            alpha=args.f_alpha_divergence_coef,
            tau=args.discopop_tau,
            weighted=args.use_weighting,
        )

    @property
    def needs_whole_batch(self) -> bool:
        """Whether values of all pairs are sorted: all of a global batch must be given at once.

        `gradients` then says what each pair contributes.
        """
        return any(name in SORTED for name, _ in self.terms)

    @property
    def needs_mean_tokens(self) -> bool:
        """Whether `pair_losses` of part of a batch must know the mean length of all its answers."""
        return any(name == "sft" for name, _ in self.terms)


def pair_losses(
    sums: PairSums, objective: Objective, mean_chosen_tokens: float | None = None
) -> Tensor:
    """Return the losses [pairs] whose mean over a global batch is the objective.

    `mean_chosen_tokens` is the number of the chosen answers' tokens in the global batch, divided by
    its pairs; None where `sums` hold all of it. ValueError if they must.
    """
    if mean_chosen_tokens is not None and objective.needs_whole_batch:
        raise ValueError(f"{objective.terms} are losses of a whole batch, not of part of it")
    total = torch.zeros_like(sums.chosen)
    for name, weight in objective.terms:
        if name == "sft":
            loss = _cross_entropy(sums, mean_chosen_tokens)
        else:
            loss = LOSSES[name](sums, objective)
        total = total + weight * loss
    return total if sums.weights is None else total * sums.weights


def gradients(sums: PairSums, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of a whole batch's mean loss by its `chosen`, `rejected`,
    `chosen_nll`; [pairs] each.

    They are numbers, so that a pair's part of the gradient is that of their product with its sums,
    wherever and in whatever micro-batch it is computed.
    """
    leaves = [
        each.detach().requires_grad_() for each in (sums.chosen, sums.rejected, sums.chosen_nll)
    ]
    with torch.enable_grad():
        given = sums._replace(chosen=leaves[0], rejected=leaves[1], chosen_nll=leaves[2])
        mean = pair_losses(given, objective).mean()
        found = torch.autograd.grad(mean, leaves, allow_unused=True)
    chosen, rejected, nll = (
        torch.zeros_like(leaf) if each is None else each
        for each, leaf in zip(found, leaves, strict=True)
    )
    return chosen, rejected, nll


def pair_metrics(sums: PairSums, beta: float) -> dict[str, Tensor]:
    """Return what is logged of each pair, [pairs] each; the log has their means.

    The rewards are those of DPO, beta times the log-ratio, whatever the loss and divergence.
    """
    sums = PairSums(*(None if each is None else each.detach() for each in sums))  # type: ignore[arg-type]
    chosen, rejected = beta * sums.chosen_ratio, beta * sums.rejected_ratio
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": sums.chosen,
        "logps/rejected": sums.rejected,
    }


def answer_weight(log_probs: Tensor, log_collisions: Tensor, tokens: Tensor) -> Tensor:
    """Return an answer's weight in WPO (arXiv:2406.11827, equation 2), without gradient.

    `log_probs` and `log_collisions` are sums over the answer's tokens, the latter of the logarithm
    of the sum of all squared probabilities; all tensors [answers].
    """
    return ((log_probs - log_collisions) / tokens.clamp(min=1)).exp().detach()


def _scores(sums: PairSums, objective: Objective) -> tuple[Tensor, Tensor]:
    """f' of the log-ratios of both sides, for the divergence f (arXiv:2309.16240)."""
    divergence: dict[str, Callable[[Tensor], Tensor]] = {
        "reverse_kl": lambda ratio: ratio,
        "forward_kl": lambda ratio: 1 - torch.exp(-ratio),
        "js_divergence": lambda ratio: math.log(2) + logsigmoid(ratio),
        "alpha_divergence": lambda ratio: _alpha_divergence(ratio, objective.alpha - 1),
    }
    score = divergence[objective.divergence]
    return score(sums.chosen_ratio), score(sums.rejected_ratio)


def _alpha_divergence(ratio: Tensor, power: float) -> Tensor:
    if abs(power) < 1e-6:  # the limit
        return ratio
    return (torch.exp((power * ratio).clamp(max=80.0)) - 1) / power  # exp(89) overflows


def _margin(sums: PairSums, objective: Objective) -> Tensor:
    chosen, rejected = _scores(sums, objective)
    return objective.beta * (chosen - rejected)


def _mean_scores(sums: PairSums, objective: Objective) -> Tensor:
    """The difference of both sides' scores per token."""
    chosen, rejected = _scores(sums, objective)
    return chosen / sums.chosen_tokens.clamp(min=1) - rejected / sums.rejected_tokens.clamp(min=1)


def _smoothed(margin: Tensor, objective: Objective) -> Tensor:
    smoothing = objective.label_smoothing
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def _sigmoid(sums: PairSums, objective: Objective) -> Tensor:
    return _smoothed(_margin(sums, objective), objective)


def _sigmoid_norm(sums: PairSums, objective: Objective) -> Tensor:
    return -logsigmoid(objective.beta * _mean_scores(sums, objective))


def _hinge(sums: PairSums, objective: Objective) -> Tensor:
    return relu(1 - _margin(sums, objective))


def _ipo(sums: PairSums, objective: Objective) -> Tensor:
    return (_mean_scores(sums, objective) - 1 / (2 * objective.beta)) ** 2


def _exo_pair(sums: PairSums, objective: Objective) -> Tensor:
    """The divergence of the preferences by the model from those by the smoothed labels."""
    margin, smoothing = _margin(sums, objective), objective.label_smoothing
    wins = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-smoothing))
    return wins + torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(smoothing))


def _robust(sums: PairSums, objective: Objective) -> Tensor:
    margin, smoothing = _margin(sums, objective), objective.label_smoothing
    unbiased = -(1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin)
    return unbiased / (1 - 2 * smoothing)


def _nca_pair(sums: PairSums, objective: Objective) -> Tensor:
    chosen, rejected = _rewards(sums, objective)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(sums: PairSums, objective: Objective) -> Tensor:
    chosen, rejected = _rewards(sums, objective)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def _sppo_hard(sums: PairSums, objective: Objective) -> Tensor:
    half = 0.5 / objective.beta
    return (sums.chosen_ratio - half) ** 2 + (sums.rejected_ratio + half) ** 2


def _apo_zero(sums: PairSums, objective: Objective) -> Tensor:
    chosen, rejected = _rewards(sums, objective)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def _apo_down(sums: PairSums, objective: Objective) -> Tensor:
    chosen, rejected = _rewards(sums, objective)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def _discopop(sums: PairSums, objective: Objective) -> Tensor:
    margin = _margin(sums, objective)
    share = torch.sigmoid(margin / objective.tau)
    return -logsigmoid(margin) * (1 - share) + torch.exp(-margin) * share


def _aot(sums: PairSums, objective: Objective) -> Tensor:
    """Compares the model's and the reference's preferences, each sorted over the batch."""
    model = (sums.chosen - sums.rejected).sort().values
    reference = (sums.ref_chosen - sums.ref_rejected).sort().values
    return _smoothed(objective.beta * (model - reference), objective)


def _aot_unpaired(sums: PairSums, objective: Objective) -> Tensor:
    """Compares the chosen answers' log-ratios with the rejected ones', each sorted."""
    margin = sums.chosen_ratio.sort().values - sums.rejected_ratio.sort().values
    return _smoothed(objective.beta * margin, objective)


def _rewards(sums: PairSums, objective: Objective) -> tuple[Tensor, Tensor]:
    return objective.beta * sums.chosen_ratio, objective.beta * sums.rejected_ratio


def _cross_entropy(sums: PairSums, mean_tokens: float | None) -> Tensor:
    """The chosen answers' cross entropy: its mean over pairs is one over the batch's tokens."""
    if mean_tokens is None:
        return sums.chosen_nll / sums.chosen_tokens.mean().clamp(min=1)
    return sums.chosen_nll / mean_tokens


LOSSES: dict[str, Callable[[PairSums, Objective], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
"""Every loss type but sft, which needs no score."""
