"""Flags of preference training: every one acts, and what cannot work ends in one line."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from swiftmeg.args.commands import PrepareArguments, RlhfArguments, SftArguments
from swiftmeg.args.flags import parse_flags
from swiftmeg.args.preference_rules import settle_preference
from swiftmeg.args.resolve import resolve
from swiftmeg.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

LOSSES = "tests/trainers/test_dpo_losses.py"
RUNS = "tests/trainers/test_dpo.py"
HERE = "tests/args/test_preference.py"
SHOWN_BY = {
    "rlhf_type": HERE,
    "rpo_alpha": HERE,
    "loss_scale": HERE,
    "calculate_per_token_loss": HERE,
    "beta": LOSSES,
    "loss_type": LOSSES,
    "loss_weights": LOSSES,
    "label_smoothing": LOSSES,
    "f_divergence_type": LOSSES,
    "f_alpha_divergence_coef": LOSSES,
    "discopop_tau": LOSSES,
    "ld_alpha": "tests/data/test_pairs.py",
    "use_weighting": LOSSES,
    "reference_free": HERE,
    "ref_load": RUNS,
    "ref_model": RUNS,
    "ref_adapters": HERE,
    "precompute_ref_log_probs": RUNS,
    "precompute_ref_batch_size": RUNS,
    "sync_ref_model": HERE,
    "ref_model_mixup_alpha": HERE,
    "ref_model_sync_steps": HERE,
}
"""The test file in which each flag shows what it does."""

REFUSED = {
    "rlhf_type kto": "--rlhf_type kto: KTO is not supported yet: dpo is",
    "rlhf_type rm": "--rlhf_type rm: reward modelling is not",
    "rlhf_type gkd": "--rlhf_type gkd: GKD",
    "rlhf_type grpo": "--rlhf_type grpo: GRPO",
    "rlhf_type simpo": "--rlhf_type: invalid choice: 'simpo'",
    "calculate_per_token_loss true": "the loss of pairs is their mean",
    "beta 0": "--beta 0.0: must be above 0",
    "beta nan": "--beta: 'nan' is not a finite number",
    "beta null": "--beta: 'null' is not a",
    "rpo_alpha nan": "--rpo_alpha: 'nan' is not a finite number",
    "label_smoothing 0.5": "--label_smoothing 0.5: must be from 0 to below 0.5",
    "label_smoothing -0.1": "--label_smoothing -0.1: must be",
    "label_smoothing 0.1 --loss_type hinge sft": "does not act on --loss_type hinge sft, only on",
    "loss_type exo_pair": "--loss_type exo_pair needs --label_smoothing above 0",
    "loss_type": "--loss_type needs a value",
    "loss_type dpo": "invalid choice: 'dpo'",
    "loss_weights 1 --loss_type sigmoid hinge": "1 numbers for 2 of --loss_type (sigmoid hinge)",
    "loss_weights 1 2": "--loss_weights 1.0 2.0: 2 numbers for 1 of --loss_type (sigmoid)",
    "loss_weights nan": "--loss_weights: 'nan' is not a finite number",
    **{
        f"f_divergence_type {divergence} --loss_type sigmoid {loss}": f"--loss_type {loss} is not "
        f"defined with --f_divergence_type {divergence}: use reverse_kl"
        for divergence, loss in (
            ("forward_kl", "nca_pair"), ("js_divergence", "bco_pair"),
            ("alpha_divergence", "sppo_hard"), ("forward_kl", "aot"),
            ("forward_kl", "aot_unpaired"), ("js_divergence", "apo_zero"),
            ("js_divergence", "apo_down"),
        )
    },
    "use_weighting true --loss_type aot": "weights pairs, which --loss_type aot takes apart",
    "use_weighting true --loss_type aot_pair": "which --loss_type aot_unpaired takes apart",
    "rpo_alpha 1 --loss_type sigmoid sft": "--rpo_alpha 1.0 and --loss_type sigmoid sft both add",
    "ld_alpha 1.5": "--ld_alpha 1.5: must be from 0 to 1",
    "discopop_tau 0 --loss_type discopop": "--discopop_tau 0.0: must be above 0",
    "discopop_tau 0.1": "--discopop_tau needs --loss_type discopop",
    "f_alpha_divergence_coef 0.3": "needs --f_divergence_type alpha_divergence",
    "reference_free true --ref_load x": "--reference_free true has no reference: drop --ref_load",
    "reference_free true --ref_adapters x": "drop --ref_adapters",
    "reference_free true --precompute_ref_log_probs true": "drop --precompute_ref_log_probs",
    "ref_load x --ref_model y": "--ref_load and --ref_model both name the reference model",
    "mcore_ref_model x --ref_model y": "--ref_load and --ref_model both name",
    "ref_adapters x": "--ref_adapters x: not supported yet: merge them",
    **{
        f"precompute_ref_log_probs true --{name} true": "--precompute_ref_log_probs true cannot be "
        f"used with --{name} true"
        for name in ("streaming", "lazy_tokenize", "sync_ref_model")
    },
    "precompute_ref_batch_size 0": "must be at least 1",
    "precompute_ref_batch_size 2 --precompute_ref_log_probs false": "needs --precompute_ref_log",
    "precompute_ref_batch_size 2 --streaming true": "needs --precompute_ref_log_probs true",
    "sync_ref_model true --train_type lora": "with --train_type lora it has none of its own",
    "ref_model_mixup_alpha 0.5": "--ref_model_mixup_alpha needs --sync_ref_model true",
    "ref_model_sync_steps 5": "--ref_model_sync_steps needs --sync_ref_model true",
    "ref_model_sync_steps 0 --sync_ref_model true": "must be at least 1",
    "ref_model_mixup_alpha 0 --sync_ref_model true": "must be above 0 and at most 1",
}  # fmt: skip


def settled(line: str, cls: type[Any] = RlhfArguments) -> Any:
    words = f"--{line}".split() if line else []
    args, sources = resolve(cls, parse_flags(cls, words, "megatron rlhf"), [])
    settle_preference(args, sources)
    return args


def test_every_flag_is_shown() -> None:
    shared = {each.name for each in dataclasses.fields(SftArguments)}
    own = {each.name for each in dataclasses.fields(RlhfArguments)} - shared
    assert set(SHOWN_BY) == own | {"loss_scale", "calculate_per_token_loss"}
    for name, file in SHOWN_BY.items():
        assert name in (ROOT / file).read_text()


@pytest.mark.parametrize("line", REFUSED)
def test_refuses(line: str) -> None:
    with pytest.raises(UserError) as caught:
        settled(line)
    assert REFUSED[line] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_original_command_has_its_defaults() -> None:
    args = settled("")
    assert (args.rlhf_type, args.beta, args.loss_type) == ("dpo", 0.1, ["sigmoid"])
    assert (args.loss_weights, args.rpo_alpha) == ([1.0], 1.0)
    assert (args.loss_scale, args.calculate_per_token_loss) == ("last_round", False)


@pytest.mark.parametrize("value", ["0", "-1", "null", "None"])
def test_rpo_alpha_can_be_off(value: str) -> None:
    assert settled(f"rpo_alpha {value}").rpo_alpha is None
    assert settled("rpo_alpha 0.5").rpo_alpha == 0.5


def test_rpo_alpha_can_be_null_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rpo-alpha: null\nlr: null\n")
    assert parse_flags(RlhfArguments, [str(file)], "megatron rlhf") == {"rpo_alpha": None}


def test_sft_among_the_losses_takes_the_place_of_rpo_alpha() -> None:
    args = settled("loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1")
    assert (args.loss_weights, args.rpo_alpha) == ([0.8, 0.2, 1.0], None)


def test_older_names_stand_for_newer_ones() -> None:
    assert settled("loss_type aot_pair").loss_type == ["aot_unpaired"]
    assert settled("mcore_ref_model x").ref_load == "x"


@pytest.mark.parametrize(
    ("line", "precomputed"),
    [
        ("", True),
        ("precompute_ref_log_probs false", False),
        ("streaming true", False),
        ("lazy_tokenize true", False),
        ("sync_ref_model true", False),
    ],
)
def test_the_reference_runs_first_where_it_can(line: str, precomputed: bool) -> None:
    assert settled(line).precompute_ref_log_probs is precomputed


def test_dropout_is_off_unless_asked_for() -> None:
    args = settled("")
    assert (args.lora_dropout, args.attention_dropout, args.hidden_dropout) == (0.0, 0.0, 0.0)
    args = settled("lora_dropout 0.05 --attention_dropout 0.1")
    assert (args.lora_dropout, args.attention_dropout) == (0.05, 0.1)


def test_data_takes_the_flags_with_a_method() -> None:
    assert settled("rlhf_type dpo --beta 0.2", PrepareArguments).beta == 0.2
    assert settled("packing true", PrepareArguments).rlhf_type is None
    with pytest.raises(UserError, match="--beta needs --rlhf_type dpo"):
        settled("beta 0.2", PrepareArguments)


SCRIPTS = [*sorted((ROOT / "examples").rglob("*dpo*/*.sh")), ROOT / "examples/lora/dpo.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "-".join(path.parts[-2:]))
def test_the_example_scripts_say_what_there_is(script: Path) -> None:
    line = script.read_text().replace("\\\n", "").partition("\nmegatron rlhf ")[2]
    words = shlex.split(line)
    given = parse_flags(RlhfArguments, words, "megatron rlhf")
    args, sources = resolve(RlhfArguments, given, [])
    settle_preference(args, sources)
    assert args.rpo_alpha == 1
    assert len(SCRIPTS) == 4
