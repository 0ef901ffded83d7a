"""The paths that docs/where-is.md answers with exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_answer_is_there() -> None:
    text = (ROOT / "docs" / "where-is.md").read_text()
    answers = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(answers) == 10
    for answer in answers:
        paths = re.findall(r"`((?:swiftmeg|tests|docs)/[^`]+)`", answer)
        assert paths, answer
        assert [path for path in paths if not (ROOT / path).exists()] == []
