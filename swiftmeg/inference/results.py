"""The file that answers are appended to, one JSON line each."""

import json
import time
from pathlib import Path
from typing import Any

from swiftmeg.data.turns import Message
from swiftmeg.errors import UserError


class ResultFile:
    """JSON lines with `response`, `labels` (the expected answer or null) and `messages`.

    Lines are on disk as soon as they are added. Raises UserError if `path` cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UserError(
                f"--result_path {path}: cannot be written ({error.strerror}): choose another"
            ) from None

    @staticmethod
    def default_path(model: Path) -> Path:
        """infer_result/{date}-{time}.jsonl in the model's folder."""
        return model / "infer_result" / time.strftime("%Y%m%d-%H%M%S.jsonl")

    def add(self, messages: list[Message], response: str, label: str | None = None) -> None:
        """Append one answer; `messages` is the conversation before it."""
        row: dict[str, Any] = {
            "response": response,
            "labels": label,
            "messages": [*messages, {"role": "assistant", "content": response}],
        }
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
