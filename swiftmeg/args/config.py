"""Flags from a file: `--config run.yaml`, or a first word that ends in .yaml, .yml or .json."""

import json
from collections.abc import Collection, MutableMapping
from pathlib import Path
from typing import Any

import yaml

from swiftmeg.errors import UserError

SUFFIXES = (".yaml", ".yml", ".json")
TRUE = {"true", "yes", "on", "1"}
"""Words that mean true."""
ENVIRONMENT = "ENV"
"""The key whose entries are environment variables."""


def split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The file that `argv` names, if any, and the other words."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for position, word in enumerate(words):
        if word == "--config":
            files.append(next(words, ""))
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        elif position == 0 and word.endswith(SUFFIXES):
            files.append(word)
        else:
            rest.append(word)
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1]} both are files of flags: keep one")
    return (files[0] if files else None), rest


def config_words(file: str, nullable: Collection[str] = ()) -> list[str]:
    """The flags that `file` holds, as words of a command line; null leaves a flag out.

    Null is a value of the flags `nullable`, whose default is another.
    """
    words: list[str] = []
    for name, value in _read(file).items():
        if value is None and name.replace("-", "_") in nullable:
            value = "null"
        if name == ENVIRONMENT or value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(_word, values)]
    return words


def asks_for(argv: list[str], name: str) -> bool:
    """Whether the boolean flag `name` is on in `argv` or in the file that it names."""
    file, words = split_config(argv)
    words = [*(config_words(file) if file else []), *words]
    value = False
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        flag, given, text = word.partition("=")
        if flag.replace("-", "_") == "__" + name:
            text = text if given else "true" if after.startswith("--") else after
            value = text.lower() in TRUE
    return value


def export_environment(argv: list[str], environ: MutableMapping[str, str]) -> None:
    """Set the ENV section of the file that `argv` names; variables that are set already win."""
    file, _ = split_config(argv)
    if file is None:
        return
    section = _read(file).get(ENVIRONMENT) or {}
    if not isinstance(section, dict):
        raise UserError(f"{file}: {ENVIRONMENT} must hold NAME: value pairs, not {section!r}")
    for name, value in section.items():
        environ.setdefault(str(name), _word(value))


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict | list) else str(value)


def _read(file: str) -> dict[str, Any]:
    path = Path(file).expanduser()
    if not file.endswith(SUFFIXES):
        raise UserError(f"--config {file}: name a file that ends in {', '.join(SUFFIXES)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {file}: is not {path.suffix[1:].upper()} ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"--config {file}: must hold `flag: value` pairs")
    return content
