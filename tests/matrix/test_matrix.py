"""The short form of the matrix; `make matrix` runs the whole and writes docs/exactness.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.cases import MODELS, ROWS, Row, write_inputs
from tests.matrix.harness import (
    BOUND,
    check_trained,
    compare,
    faults_of,
    one_step,
    run,
    transformers_step,
)
from tests.matrix.mutations import MUTATIONS, Mutation

Reference = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    write_inputs(folder, set(MODELS))
    return folder


@pytest.fixture(scope="module")
def reference(work: Path) -> Reference:
    """The run of one process, made when a model first needs it."""
    made: dict[str, dict[str, Any]] = {}

    def of(model: str) -> dict[str, Any]:
        if model not in made:
            made[model] = run(work, Row(model, "", "padding_free"), f"{model}-reference")
        return made[model]

    return of


@pytest.mark.parametrize("model", MODELS)
def test_one_process_computes_what_transformers_does(
    work: Path, reference: Reference, model: str
) -> None:
    found = reference(model)
    assert check_trained(found) == []
    expected = transformers_step(work, model, found)
    for key, (value, where) in compare(one_step(found), expected).items():
        assert value <= BOUND, f"{key} differs by {value} at {where}"


@pytest.mark.parametrize("row", [row for row in ROWS if row.short], ids=str)
def test_layout_computes_what_one_process_does(work: Path, reference: Reference, row: Row) -> None:
    assert faults_of(run(work, row), reference(row.model)) == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.apply.__name__)
def test_known_bug_turns_its_row_red(work: Path, reference: Reference, mutation: Mutation) -> None:
    row = mutation.row
    assert faults_of(run(work, row, mutate=mutation.apply), reference(row.model)) != []
