"""Every family of the registry, there and back in every layout: equal logits, the same bytes."""

from pathlib import Path

import pytest
import torch

from tests.families.conversion import Layout, convert_all
from tests.families.folders import weights_of, write_named
from tests.families.specimens import ALL
from tests.ranks import run_ranks

LAYOUTS = {
    "one": Layout(1),
    "tp2": Layout(2, tensor=2),
    "pp2": Layout(2, pipeline=2),
    "ep2": Layout(2, expert=2),
    "tp2-ep2-etp1": Layout(2, tensor=2, expert=2, expert_tensor=1),
    "tp2-ep2-etp2": Layout(4, tensor=2, expert=2, expert_tensor=2),
}

CASES = [
    (name, layout)
    for layout, sizes in LAYOUTS.items()
    for name, specimen in ALL.items()
    if specimen.experts or sizes.expert == 1
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in ALL:
        write_named(folder / "models" / name, name)
    return folder


_results: dict[str, list[dict[str, object]]] = {}


def results(root: Path, layout: str) -> list[dict[str, object]]:
    """What each rank found for every specimen in a layout; all of them in one process group."""
    if layout not in _results:
        names = [name for name, where in CASES if where == layout]
        where = (str(root / "models"), str(root / layout))
        size = LAYOUTS[layout]
        _results[layout] = run_ranks(size.world, convert_all, *where, names, size)
    return _results[layout]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=[f"{n}-{where}" for n, where in CASES])
def test_conversion_is_exact(root: Path, name: str, layout: str) -> None:
    found = [rank[name] for rank in results(root, layout)]
    failures = [text for text in found if isinstance(text, str)]
    assert not failures, failures[0]
    differences = [value for value in found if isinstance(value, float)]
    assert differences
    assert max(differences) <= 1e-4
    expected = torch.load(root / "models" / name / "expected.pt")["logits"]
    assert expected.abs().max() > 1.0
    before, after = weights_of(root / "models" / name), weights_of(root / layout / name / "hf")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
