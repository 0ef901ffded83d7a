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
MOST_BYTES = 2**18
"""Largest file of flags."""
MOST_VALUES = 100_000
"""Most values in a file of flags, whatever aliases repeat."""
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
        with path.open("rb") as stream:
            text = stream.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UserError(f"--config {file}: has more than {MOST_BYTES} bytes: is it a dataset?")
        content = _parse(text.decode("utf-8"))
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror})") from None
    except (_Refused, RecursionError) as error:
        reason = str(error) if isinstance(error, _Refused) else "it is nested too deeply"
        raise UserError(f"--config {file}: {reason}") from None
    except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError, numbers, dates
        reason = " ".join(str(error).split())
        raise UserError(f"--config {file}: is not {path.suffix[1:].upper()} ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"--config {file}: must hold `flag: value` pairs")
    return content


class _Refused(Exception):
    """What is YAML and not taken."""


def _parse(text: str) -> Any:
    """The value of a document, if no key is given twice and its aliases stay small.

    They are written out where they are used, so that a few lines can hold more values than fit
    into memory.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _size(root, {}) > MOST_VALUES:
            raise _Refused(f"its aliases make more than {MOST_VALUES} values: write them out")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """How many values a node and those below it are with every alias written out."""
    if id(node) in sizes:
        if (known := sizes[id(node)]) is None:
            raise _Refused("an alias stands inside of what it names")
        return known
    sizes[id(node)] = None
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise _Refused(f"line {line} gives {key.value} again: keep one")
                seen.add(key.value)
            below += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    total = 1 + sum(_size(each, sizes) for each in below)
    sizes[id(node)] = total
    return total
