"""docs/parameters.md is what the dataclasses say."""

from pathlib import Path

from swiftmeg.args.commands import RlhfArguments
from swiftmeg.args.document import document
from swiftmeg.args.flags import field_docs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parameters.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == document()


def test_every_flag_is_on_the_page() -> None:
    page = document()
    assert all(f"| `{name}` |" in page for name in field_docs(RlhfArguments))
