"""Preference flags that cannot work, alone or together, and what is filled in where none is given.

Looked at as soon as flags are read, before anything heavy is imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields

from swiftmeg.args.commands import RlhfArguments
from swiftmeg.args.preference import PreferenceArguments, ReferenceArguments
from swiftmeg.errors import UserError

SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
"""Loss types that label smoothing acts on."""

DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Loss types that are defined for every divergence: those that only see the difference of both
sides, in which the partition function cancels."""

SORTED = ("aot", "aot_unpaired")
"""Loss types that compare sorted values of a whole batch, so that no pair has a loss of its own."""

REFERENCE = ("ref_load", "ref_model", "ref_adapters")
"""Flags that name a reference."""

PLANNED = {"kto": "KTO", "rm": "reward modelling", "gkd": "GKD", "grpo": "GRPO"}
"""Values of --rlhf_type that there is no training for yet."""


def settle_preference(args: RlhfArguments, sources: dict[str, str]) -> None:
    """Check the preference flags of `args`, then fill in what depends on others.

    `sources` says which were given ("flag"). UserError for the first that cannot work.
    """
    if args.rlhf_type is None:
        for each in (*fields(PreferenceArguments), *fields(ReferenceArguments)):
            _needs(each.name, False, sources, "--rlhf_type dpo")
        return
    args.loss_type = ["aot_unpaired" if name == "aot_pair" else name for name in args.loss_type]
    for check in (_check_method, _check_numbers, _check_losses, _check_reference):
        check(args, sources)
    args.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
    if args.rpo_alpha is None or args.rpo_alpha <= 0 or "sft" in args.loss_type:
        args.rpo_alpha = None
    if args.precompute_ref_log_probs is None:
        args.precompute_ref_log_probs = not _live(args)
    _switch_dropout_off(args, sources)


def _switch_dropout_off(args: RlhfArguments, sources: dict[str, str]) -> None:
    """No dropout in the policy unless flags ask for it: it would only add noise to log-ratios."""
    continued = args.adapter_load is not None and not args.finetune
    for name in ("lora_dropout", "attention_dropout"):
        if sources[name] != "flag" and not (continued and name == "lora_dropout"):
            setattr(args, name, 0.0)
            sources[name] = f"--rlhf_type {args.rlhf_type}"


def _check_method(args: RlhfArguments, sources: dict[str, str]) -> None:
    if args.rlhf_type in PLANNED:
        raise UserError(
            f"--rlhf_type {args.rlhf_type}: {PLANNED[args.rlhf_type]} is not supported yet: dpo is"
        )
    if args.calculate_per_token_loss and sources["calculate_per_token_loss"] == "flag":
        raise UserError(
            "--calculate_per_token_loss true: the loss of pairs is their mean, not one over "
            "tokens: drop it"
        )


def _check_numbers(args: RlhfArguments, sources: dict[str, str]) -> None:
    wanted: dict[str, tuple[Callable[[float], bool], str]] = {
        "beta": (lambda value: value > 0, "above 0"),
        "label_smoothing": (lambda value: 0 <= value < 0.5, "from 0 to below 0.5"),
        "discopop_tau": (lambda value: value > 0, "above 0"),
        "ld_alpha": (lambda value: 0 <= value <= 1, "from 0 to 1"),
        "precompute_ref_batch_size": (lambda value: value >= 1, "at least 1"),
        "ref_model_mixup_alpha": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
        "ref_model_sync_steps": (lambda value: value >= 1, "at least 1"),
    }
    for name, (fits, limits) in wanted.items():
        value = getattr(args, name)
        if value is not None and not fits(value):
            raise UserError(f"--{name} {value}: must be {limits}")


def _check_losses(args: RlhfArguments, sources: dict[str, str]) -> None:
    types, shown = args.loss_type, " ".join(args.loss_type)
    if not types:
        raise UserError("--loss_type needs a value: name one, such as sigmoid, or several")
    if args.loss_weights and len(args.loss_weights) != len(types):
        raise UserError(
            f"--loss_weights {' '.join(map(str, args.loss_weights))}: {len(args.loss_weights)} "
            f"numbers for {len(types)} of --loss_type ({shown}): give one for each"
        )
    if args.f_divergence_type != "reverse_kl" and (rest := _without(types, DIVERGENT)):
        raise UserError(
            f"--loss_type {rest[0]} is not defined with --f_divergence_type "
            f"{args.f_divergence_type}: use reverse_kl, or one of {', '.join(DIVERGENT)}"
        )
    if args.label_smoothing and not set(types) & set(SMOOTHED):
        raise UserError(
            f"--label_smoothing {args.label_smoothing} does not act on --loss_type {shown}, only "
            f"on {', '.join(SMOOTHED)}: drop it"
        )
    if "exo_pair" in types and not args.label_smoothing:
        raise UserError(
            "--loss_type exo_pair needs --label_smoothing above 0: its paper recommends 1e-3"
        )
    if args.use_weighting and set(types) & set(SORTED):
        raise UserError(
            f"--use_weighting true weights pairs, which --loss_type {shown} takes apart: drop one"
        )
    if sources["rpo_alpha"] == "flag" and (args.rpo_alpha or 0) > 0 and "sft" in types:
        raise UserError(
            f"--rpo_alpha {args.rpo_alpha} and --loss_type {shown} both add the chosen answers' "
            "cross entropy: drop one"
        )
    _needs("f_alpha_divergence_coef", args.f_divergence_type == "alpha_divergence", sources,
           "--f_divergence_type alpha_divergence")  # fmt: skip
    _needs("discopop_tau", "discopop" in types, sources, "--loss_type discopop")


def _without(types: Sequence[str], known: Sequence[str]) -> list[str]:
    return [name for name in types if name not in known]


def _needs(name: str, met: bool, sources: dict[str, str], needed: str) -> None:
    if sources[name] == "flag" and not met:
        raise UserError(f"--{name} needs {needed}: set it or drop --{name}")


def _live(args: RlhfArguments) -> bool:
    """Whether the reference must be there while training."""
    return bool(args.streaming or args.lazy_tokenize or args.sync_ref_model)


def _check_reference(args: RlhfArguments, sources: dict[str, str]) -> None:
    named = [name for name in REFERENCE if getattr(args, name)]
    if args.reference_free:
        named += [name for name in ("sync_ref_model", "precompute_ref_log_probs")
                  if getattr(args, name)]  # fmt: skip
        if named:
            raise UserError(f"--reference_free true has no reference: drop --{named[0]}")
    if args.ref_load and args.ref_model:
        raise UserError("--ref_load and --ref_model both name the reference model: keep one")
    if args.ref_adapters:
        raise UserError(
            f"--ref_adapters {' '.join(args.ref_adapters)}: not supported yet: merge them "
            "(swift export --merge_lora true) and name the result by --ref_model"
        )
    if args.precompute_ref_log_probs and _live(args):
        for name in ("streaming", "lazy_tokenize", "sync_ref_model"):
            if getattr(args, name):
                raise UserError(
                    f"--precompute_ref_log_probs true cannot be used with --{name} true: drop one"
                )
    precomputed = args.precompute_ref_log_probs is not False and not _live(args)
    _needs("precompute_ref_batch_size", precomputed and not args.reference_free, sources,
           "--precompute_ref_log_probs true")  # fmt: skip
    for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
        _needs(name, args.sync_ref_model, sources, "--sync_ref_model true")
    if args.sync_ref_model and args.is_lora:
        raise UserError(
            "--sync_ref_model true moves the reference's weights, and with --train_type lora it "
            "has none of its own: drop it"
        )
