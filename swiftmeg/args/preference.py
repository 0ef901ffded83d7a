"""Flags of `megatron rlhf`: what is learned from pairs of answers, and against which reference."""

from dataclasses import dataclass, field
from typing import Literal

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "aot_pair",
]
RlhfType = Literal["dpo", "kto", "rm", "gkd", "grpo"]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclass
class PreferenceArguments:
    """Preference training

    Pairs of a chosen and a rejected answer train the model by direct preference optimisation (DPO,
    arXiv:2305.18290). Losses mean what they mean in TRL 1.16.
    """

    rlhf_type: RlhfType | None = "dpo"
    """Which algorithm: dpo."""
    beta: float = 0.1
    """Strength of the pull towards the reference model; the reward is beta times the log-ratio of
    model and reference."""
    loss_type: list[LossType] = field(default_factory=lambda: ["sigmoid"])
    """Form of the loss, or several, which are added up by --loss_weights. ipo (arXiv:2310.12036)
    and sigmoid_norm divide the log-ratios by the answers' lengths, ipo in older TRL did not;
    bco_pair (arXiv:2404.04656) has no running mean of rewards; sft is the chosen answers' cross
    entropy; aot and aot_unpaired (arXiv:2406.05882), once aot_pair, sort the global batch."""
    loss_weights: list[float] = field(default_factory=list)
    """Weight of each --loss_type, as MPO (arXiv:2411.10442) has 0.8 0.2 1 for sigmoid bco_pair sft.
    None: 1 each."""
    rpo_alpha: float | None = 1.0
    """Weight of the chosen answers' cross entropy (RPO, arXiv:2404.19733), a mean over the tokens
    of the global batch, beside the loss; 0, a negative number or null leaves it out. Where sft is a
    --loss_type: left out."""
    label_smoothing: float = 0.0
    """Share of preferences taken to be wrong, from 0 to below 0.5, for sigmoid (cDPO; TRL has
    dropped it there), robust (arXiv:2403.00409), exo_pair (arXiv:2402.00856; above 0, such as
    1e-3), aot and aot_unpaired."""
    f_divergence_type: Divergence = "reverse_kl"
    """Divergence from the reference model, f' of whose log-ratio takes the log-ratio's place
    (arXiv:2309.16240), for sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust, discopop, sft. In
    older TRL js_divergence and alpha_divergence had other formulas."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of alpha_divergence; 1 is reverse_kl. Older TRL: another formula, with 1."""
    discopop_tau: float = 0.05
    """Temperature of the mixture in discopop (arXiv:2406.08414)."""
    ld_alpha: float | None = None
    """Weight, from 0 to 1, of the log-probabilities of a longer answer's tokens beyond the length
    of the shorter one (LD-DPO, arXiv:2409.06411). None: 1."""
    use_weighting: bool = False
    """Weight each pair by its answers' probability under the model (WPO, arXiv:2406.11827)."""
    reference_free: bool = False
    """Take a uniform distribution for the reference model: its log-probabilities count as 0, in
    the rewards too."""


@dataclass
class ReferenceArguments:
    """Reference model

    The model that training starts from, unless flags name another; with adapters, the model without
    them, or with those that training starts from.
    """

    ref_load: str | None = None
    """Megatron checkpoint of the reference model."""
    ref_model: str | None = None
    """Hugging Face folder or hub id of the reference model."""
    ref_adapters: list[str] = field(default_factory=list)
    """PEFT folder of adapters that the reference model has. Not supported yet: merge them."""
    precompute_ref_log_probs: bool | None = None
    """Compute the reference's log-probabilities once, before training, and keep them beside the
    tokens; false has the reference model run in every step. None: true, but for --streaming,
    --lazy_tokenize and --sync_ref_model."""
    precompute_ref_batch_size: int | None = None
    """Pairs that go through the reference together before training. None: --micro_batch_size."""
    sync_ref_model: bool = False
    """Move the reference towards the model while training (TR-DPO, arXiv:2404.09656)."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the model in each such move."""
    ref_model_sync_steps: int = 512
    """Steps between such moves."""
