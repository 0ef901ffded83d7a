"""Aliases are other spellings of the same flags."""

import dataclasses
import re
from typing import Any

import pytest

from swiftmeg.args.aliases import ALIASES, NEGATED
from swiftmeg.args.commands import ExportArguments, RlhfArguments
from swiftmeg.args.flags import parse_flags
from swiftmeg.errors import UserError

VALUES: dict[str, Any] = {
    "megatron_extra_kwargs": '{"a": 1}',
    "tuner_type": "lora",
    "ddp_backend": "nccl",
}


def parse(*words: str) -> dict[str, Any]:
    return parse_flags(RlhfArguments, list(words), "megatron rlhf")


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_sets_its_field(alias: str) -> None:
    name, value = ALIASES[alias], VALUES.get(alias, "3")
    assert parse(f"--{alias}", value) == parse(f"--{name}", value) != {}
    assert parse(f"--{alias.replace('_', '-')}", value, f"--{name}", value).keys() == {name}


@pytest.mark.parametrize("alias", NEGATED)
def test_a_negated_alias_means_the_opposite(alias: str) -> None:
    assert parse(f"--{alias}", "true") == {NEGATED[alias]: False}
    assert parse(f"--{alias}", "false") == {NEGATED[alias]: True}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--save_steps 3 --save_interval 4", "--save_interval 4 and --save_steps 3 contradict"),
        (
            "--apply_rope_fusion true --no_rope_fusion true",
            "--no_rope_fusion true and --apply_rope_fusion true contradict each other: keep one",
        ),
        ("--mcore_adapter a --mcore_adapters b", "--mcore_adapter a and --mcore_adapters b"),
    ],
)
def test_two_spellings_must_agree(words: str, line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        parse(*words.split())


def test_a_field_of_the_same_name_keeps_its_meaning() -> None:
    words = ["--mcore_model", "a", "--output_dir", "b"]
    given = parse_flags(ExportArguments, words, "swift export")
    assert given == {"mcore_model": "a", "output_dir": "b"}


def test_every_alias_has_a_field() -> None:
    fields = {each.name for each in dataclasses.fields(RlhfArguments)}
    assert set((ALIASES | NEGATED).values()) <= fields
    assert not set(ALIASES | NEGATED) & fields
