"""The family that docs/add-a-family.md describes works as it stands there."""

import re
from pathlib import Path

from tests.families.conversion import Layout, convert
from tests.families.specimens import SPECIMENS, default_specimen, weights_of, write
from tests.ranks import run_ranks

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "add-a-family.md"
ARCHITECTURE = "SeedOssForCausalLM"


def documented() -> str:
    """The guide's Python file."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    return str(code)


def convert_documented(root: str, out: str, layout: Layout) -> float | None:
    exec(compile(documented(), "seed_oss.py", "exec"), {"__name__": "seed_oss"})
    return convert(Path(root), Path(out), ARCHITECTURE, layout)


def test_documented_family_is_short_and_exact(tmp_path: Path) -> None:
    assert len(documented().splitlines()) <= 40
    assert ARCHITECTURE not in SPECIMENS
    specimen = default_specimen(ARCHITECTURE)
    write(tmp_path / "models" / ARCHITECTURE, specimen, seed=5)
    layout = Layout(2, tensor=2)
    found = run_ranks(2, convert_documented, str(tmp_path / "models"), str(tmp_path), layout)
    assert max(value for value in found if value is not None) <= 1e-4
    before = weights_of(tmp_path / "models" / ARCHITECTURE)
    after = weights_of(tmp_path / ARCHITECTURE / "hf")
    assert before.keys() == after.keys()
    assert all((after[key] == tensor).all() for key, tensor in before.items())
