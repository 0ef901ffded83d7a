"""docs/parameters.md is what the dataclasses say."""

from pathlib import Path

from swiftmeg.args.commands import RlhfArguments
from swiftmeg.args.document import document
from swiftmeg.args.effects import acts_where
from swiftmeg.args.flags import field_docs
from swiftmeg.args.rules import TRANSFORMER_ENGINE
from swiftmeg.args.unsupported import ACCEPTED, NOTED, planned_flags
from tests.args.test_parameters import TRAINING, Refused, Says

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parameters.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == document()


def test_the_page_says_where_flags_act() -> None:
    """As the table of flags shows it: what is refused here without TransformerEngine says so."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    page = {row[0].strip("| `"): row for row in rows}
    for name, row in TRAINING.items():
        says = " | ".join(page[name])
        if isinstance(row, Says):
            assert f"accepted, neutral: {ACCEPTED[name]}" in says
        elif name in NOTED:
            assert f"accepted, neutral: {NOTED[name]}" in says
        elif name in planned_flags(RlhfArguments):
            assert isinstance(row, Refused)
            assert "refused at any other value" in says
        else:
            assert acts_where(name) in says
    for name in TRANSFORMER_ENGINE:
        assert "| with TransformerEngine |" in " | ".join(page[name])


def test_every_flag_is_on_the_page() -> None:
    page = document()
    assert all(f"| `{name}` |" in page for name in field_docs(RlhfArguments))
