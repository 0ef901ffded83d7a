"""The one place where an argument gets its value, and remembers from where."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from swiftmeg.json_files import read_object

ARGS_FILE = "args.json"
SOURCES_FILE = "args_sources.json"


COMMAND_LINE_ALONE = (
    "trust_remote_code",
    "external_plugins",
    "custom_register_path",
    "model_kwargs",
    "extra_megatron_kwargs",
)
"""Arguments that run code, or say what libraries may do: no file that comes with a model or a
checkpoint sets them."""


def resolve(
    cls: type[Any], given: dict[str, Any], layers: list[tuple[str, dict[str, Any]]]
) -> tuple[Any, dict[str, str]]:
    """Make a `cls`: typed flags win, then the first layer with a value, then the default.

    Returns the instance and, per field, its source: "flag", a layer's name or "default". Layers
    may hold more keys than `cls` has fields; their None values and empty lists count as absent, and
    none of them sets what the command line alone may.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        name = field.name
        sources[name] = "default"
        if name in given:
            values[name], sources[name] = given[name], "flag"
            continue
        for source, layer in layers if name not in COMMAND_LINE_ALONE else ():
            if layer.get(name) not in (None, []):
                values[name], sources[name] = layer[name], source
                break
    return cls(**values), sources


def read_args_file(folder: str | Path) -> dict[str, Any]:
    """The args.json of a checkpoint or model folder; empty if there is none."""
    path = Path(folder) / ARGS_FILE
    if not path.is_file():
        return {}
    return read_object(path)


def write_args_file(folder: Path, args: Any, sources: dict[str, str]) -> None:
    """Write every argument to args.json, tokens nulled, and where each came from beside it."""
    values = {
        name: None if name.endswith("_token") else value for name, value in vars(args).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((ARGS_FILE, values), (SOURCES_FILE, sources)):
        part = folder / f".{name}.part"
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        part.replace(folder / name)  # a killed process leaves no half of it


def describe(args: Any, sources: dict[str, str]) -> str:
    """A line `name  value  source` for every argument that is not at its default."""
    rows = [
        (name, str(getattr(args, name)), source)
        for name, source in sources.items()
        if source != "default"
    ]
    if not rows:
        return "all arguments have their defaults"
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    widths[1] = min(widths[1], 60)
    return "\n".join(f"{n:<{widths[0]}}  {v:<{widths[1]}}  {s}" for n, v, s in sorted(rows))


def world_size() -> int:
    """Processes of this job, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))
