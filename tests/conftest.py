"""What test modules share: specimens written once a session, and which cases were selected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.folders import write_named

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
