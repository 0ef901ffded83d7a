"""JSON files that hold one object: configurations, indices, arguments."""

import json
from pathlib import Path
from typing import Any

from swiftmeg.errors import UserError
from swiftmeg.trust import Untrusted, stays_inside

INDEX = "model.safetensors.index.json"
"""The file that says which file each tensor is in."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError if it holds anything else, or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise UserError(f"{path} is not JSON ({reason}): repair it, or copy it again") from None
    if not isinstance(content, dict):
        found = {list: "a list", str: "a string", type(None): "null"}.get(type(content), content)
        raise UserError(f"{path} holds {found}, not an object: repair it, or copy it again")
    return content


def read_weight_map(index: Path) -> dict[str, str]:
    """The file that each tensor is in, as a safetensors index says.

    UserError for what is no index; Untrusted for files outside of its folder.
    """
    try:
        names = read_object(index).get("weight_map")
    except UserError as error:
        raise UserError(f"{index} is not a safetensors index ({error})") from None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} is not a safetensors index (it has no weight_map of tensors)")
    for name, file in names.items():
        if not isinstance(file, str):
            raise UserError(f"{index} is not a safetensors index (it has no file for {name})")
        if not stays_inside(file):
            raise Untrusted(
                f"{index} names {file!r} for {name}, which is outside of its folder: use models "
                "from those whom you trust"
            )
    return names
