"""The family that docs/add-a-family.md points to is as short as it says, and tested like all."""

import re
from pathlib import Path

from swiftmeg.models.family import REGISTRY
from tests.families.specimens import ALL, SPECIMENS

ROOT = Path(__file__).resolve().parents[2]


def test_documented_family_is_short_and_tested_by_itself() -> None:
    guide = (ROOT / "docs" / "add-a-family.md").read_text()
    named = re.findall(r"swiftmeg/models/families/\w+\.py", guide)
    (architecture,) = re.findall(r"-k (\w+)", guide)
    assert len((ROOT / named[0]).read_text().splitlines()) <= 40
    assert architecture in REGISTRY.families.keys() & ALL.keys() - SPECIMENS.keys()
    assert architecture in (ROOT / named[0]).read_text()
