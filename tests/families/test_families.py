"""Every family of the registry, there and back in every layout: equal logits, the same bytes."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftmeg.models.family import REGISTRY
from swiftmeg.models.layout import Layout as WeightLayout
from tests.families.conversion import Layout, convert_all
from tests.families.folders import weights_of
from tests.families.specimens import ALL, ARCHITECTURES, label
from tests.ranks import run_ranks

LAYOUTS = {
    "one": Layout(1),
    "tp2": Layout(2, tensor=2),
    "pp2": Layout(2, pipeline=2),
    "ep2": Layout(2, expert=2),
    "tp2-ep2-etp1": Layout(2, tensor=2, expert=2, expert_tensor=1),
    "tp2-ep2-etp2": Layout(4, tensor=2, expert=2, expert_tensor=2),
}

Case = tuple[str, str]


def first_with_each_layout() -> set[str]:
    """For every weight layout the first specimen whose family has it."""
    first: dict[WeightLayout, str] = {}
    for name in ALL:
        for row in REGISTRY.families[ARCHITECTURES.get(name, name)].rows:
            first.setdefault(row.layout, name)
    return set(first.values())


EVERYWHERE = first_with_each_layout()
"""The others' further layouts repeat what these show: a weight layout knows nothing of families."""


def cases() -> Iterator[Any]:
    for layout, sizes in LAYOUTS.items():
        for name, specimen in ALL.items():
            if specimen.experts or sizes.expert == 1:
                repeats = layout not in ("one", "tp2") and name not in EVERYWHERE
                marks = [pytest.mark.exhaustive] if repeats else []
                yield pytest.param((name, layout), marks=marks, id=f"{label(name)}-{layout}")


Results = Callable[[str], list[dict[str, object]]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def results(
    specimens: Callable[[str], Path], selected: Callable[[str], list[Case]], out: Path
) -> Results:
    """results(layout): what each rank found of its selected specimens, in one process group."""

    @functools.cache
    def convert(layout: str) -> list[dict[str, object]]:
        names = [name for name, where in selected("case") if where == layout]
        (root,) = {specimens(name).parent for name in names}
        size = LAYOUTS[layout]
        return run_ranks(size.world, convert_all, str(root), str(out / layout), names, size)

    return convert


@pytest.mark.parametrize("case", cases())
def test_conversion_is_exact(
    specimens: Callable[[str], Path], results: Results, out: Path, case: Case
) -> None:
    name, layout = case
    found = [rank[name] for rank in results(layout)]
    failures = [text for text in found if isinstance(text, str)]
    assert not failures, failures[0]
    differences = [value for value in found if isinstance(value, float)]
    assert differences
    assert max(differences) <= 1e-4
    expected = torch.load(specimens(name) / "expected.pt")["logits"]
    assert expected.abs().max() > 1.0
    before, after = weights_of(specimens(name)), weights_of(out / layout / name / "hf")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
