"""Command-line syntax: dataclass fields become flags, attribute docstrings become help.

`--flag value`, `--flag true|false` (a bare `--flag` means true), lists by spaces, dicts as JSON,
underscores or hyphens, also under a flag's aliases. Only what the user typed is returned; defaults
are the resolver's business.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import json
import logging
import math
import re
import textwrap
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from swiftmeg.args.aliases import aliases_of, merge_aliases
from swiftmeg.args.config import TRUE, config_words, split_config
from swiftmeg.errors import UserError

_LOG = logging.getLogger(__name__)

_NEAR = 0.8
"""How alike a flag's name and an unknown one are, from 0 to 1, where it is offered."""

_FALSE = {"false", "no", "off", "0"}
NULL = {"null", "none"}
"""Words that mean no number, where a flag can do without."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse says "argument --a_b/--a-b: ..."
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        raise UserError(f"{self.prog}: {message}")


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring written under each field of dataclass `cls`, bases included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:]):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    docs[node.target.id] = inspect.cleandoc(str(after.value.value))
    return docs


def _boolean(text: str) -> bool:
    word = text.lower()
    if word in TRUE | _FALSE:
        return word in TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _number(kind: type) -> Any:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
            return value
        except (ValueError, OverflowError):
            word = {int: "a whole number", float: "a finite number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None

    return convert


def _or_null(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() in NULL else convert(text)


def _argparse_type(annotation: Any) -> dict[str, Any]:
    """Translate a field annotation into add_argument's keywords."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        (inner,) = (member for member in members if member is not type(None))
        known = _argparse_type(inner)
        return known | {"type": _or_null(known["type"])} if inner in (int, float) else known
    if origin is Literal:
        return {"choices": list(members), "type": type(members[0])}
    if origin is list:
        inner = _argparse_type(members[0])
        choices = {"choices": inner["choices"]} if "choices" in inner else {}
        return {"nargs": "*", "type": inner["type"], "metavar": "V", **choices}
    if annotation is bool:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    if origin is dict or annotation is dict:
        return {"type": _json_object, "metavar": "JSON"}
    if annotation in (int, float):
        return {"type": _number(annotation), "metavar": annotation.__name__.upper()}
    return {"type": str, "metavar": "STR"}


def _nullable(cls: type) -> set[str]:
    """Fields that can be null and are something else by default."""
    hints = get_type_hints(cls)
    return {
        each.name
        for each in dataclasses.fields(cls)
        if each.default not in (None, dataclasses.MISSING)
        and type(None) in get_args(hints[each.name])
        and not {int, float}.isdisjoint(get_args(hints[each.name]))
    }


def _owners(cls: type) -> dict[str, type]:
    """Map each field to the dataclass in `cls`'s bases that declares it first."""
    owners: dict[str, type] = {}
    for base in reversed(cls.__mro__):
        for name in vars(base).get("__annotations__", {}):
            owners.setdefault(name, base)
    return owners


def build_parser(cls: type, prog: str) -> argparse.ArgumentParser:
    """Make the argparse parser of dataclass `cls`; every default is SUPPRESS."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [FILE.yaml|FILE.json] [--flag value ...]",
        allow_abbrev=False,
        description=inspect.getdoc(cls),
    )
    docs, hints, owners = field_docs(cls), get_type_hints(cls), _owners(cls)
    groups: dict[type, Any] = {}
    for owner in cls.__mro__:
        if owner in owners.values():
            title = (inspect.getdoc(owner) or owner.__name__).splitlines()[0]
            groups[owner] = parser.add_argument_group(title)
    for field in dataclasses.fields(cls):
        names = [f"--{field.name}"]
        if "_" in field.name:
            names.append(f"--{field.name.replace('_', '-')}")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = f"{docs.get(field.name, '')} (default: {default})".replace("%", "%%")
        groups[owners[field.name]].add_argument(
            *names,
            dest=field.name,
            default=argparse.SUPPRESS,
            help=text,
            **_argparse_type(hints[field.name]),
        )
    for alias, name in aliases_of({field.name for field in dataclasses.fields(cls)}).items():
        parser.add_argument(
            f"--{alias}",
            f"--{alias.replace('_', '-')}",
            dest=alias,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
            **_argparse_type(hints[name]),
        )
    return parser


def parse_flags(cls: type, argv: list[str], prog: str) -> dict[str, Any]:
    """Parse `argv` by the fields of `cls`; return only what was typed, by field name.

    Flags of the file that `argv` names (see config.py) count as typed, and give way to flags. Of a
    flag that is typed twice the last value counts, so that scripts can be called with more flags,
    and a line says so; in a file it is an error.
    Raises UserError for an unknown flag (naming the nearest one), a stray word, or a value of the
    wrong type.
    """
    file, argv = split_config(argv)
    if file is not None:
        words = config_words(file, _nullable(cls))
        return _parse(cls, words, file, in_file=True) | _parse(cls, argv, prog)
    return _parse(cls, argv, prog)


def _parse(cls: type, argv: list[str], prog: str, *, in_file: bool = False) -> dict[str, Any]:
    flags = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    twice = [name for name, count in Counter(flags).items() if count > 1]
    if twice and in_file:
        raise UserError(f"{prog}: {twice[0]} is given twice: keep one")
    known, rest = build_parser(cls, prog).parse_known_args(argv)
    if rest:
        flag = rest[0].split("=")[0]
        if not flag.startswith("--"):
            raise UserError(f"{prog}: unexpected word {rest[0]!r}: flags start with --")
        names = [field.name for field in dataclasses.fields(cls)]
        near = difflib.get_close_matches(
            flag.lstrip("-").replace("-", "_"), names, n=1, cutoff=_NEAR
        )
        hint = f"did you mean --{near[0]}?" if near else f"see {prog} --help"
        raise UserError(f"{prog}: unknown flag {flag}: {hint}")
    for name in twice:
        _LOG.warning("--%s is given twice: the last counts: %s", name, vars(known)[name])
    return merge_aliases(vars(known), {field.name for field in dataclasses.fields(cls)})
