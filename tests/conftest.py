"""What test modules share: specimens written once a session, and which cases were selected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.folders import write_named

FIRST = (
    "matrix/test_matrix.py",
    "test_quickstart.py",
    "layouts/test_layer_gradients.py",
    "tuners/test_adapters_every_family.py",
    "families/test_families.py",
    "cli/test_checkpoints.py",
    "layouts/test_experts.py",
    "cli/test_resume.py",
    "cli/test_guide.py",
)
"""The longest files: started first, none is left for one of two processes at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=turn)


Specimens = Callable[[str], Path]


@pytest.fixture(scope="session")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> Specimens:
    """specimens(name): the folder of a specimen, which tests only read; written when first asked.

    All folders stand in one.
    """
    root = tmp_path_factory.mktemp("specimens")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            write_named(root / name, name)
        return root / name

    return folder


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> Callable[[str], list[Any]]:
    """selected(parameter): its values in the selected cases of this module, without repetitions."""

    def values(parameter: str) -> list[Any]:
        found = []
        for item in request.session.items:
            case = getattr(item, "callspec", None)
            if item.path == request.path and case and parameter in case.params:
                found.append(case.params[parameter])
        return list(dict.fromkeys(found))

    return values
