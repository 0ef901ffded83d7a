"""`python -m swiftmeg.args.document > docs/parameters.md`: every flag, from the dataclasses."""

import dataclasses
import inspect
import json
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from swiftmeg.args.aliases import NEGATED, aliases_of
from swiftmeg.args.commands import (
    ExportArguments,
    PtArguments,
    RlhfArguments,
    SftArguments,
)
from swiftmeg.args.effects import acts_where
from swiftmeg.args.flags import field_docs
from swiftmeg.args.unsupported import ACCEPTED, NOTED, default_of, planned_flags, refusal

HEAD = """\
# Parameters

Made by `python -m swiftmeg.args.document > docs/parameters.md`; a test compares.

A flag is written `--name value`. `true` and `false` are booleans (a bare `--name` is true), lists
are separated by spaces, objects are JSON. None: as the meaning says. Aliases are other spellings
of the same flag, from the original's 4.x releases; `not x` takes the opposite value.

Flags can also stand in a YAML or JSON file, which is the first word of the command or the value of
`--config`: keys are the names of flags, and a section `ENV` holds environment variables. Flags and
variables of the command line win.

The column "acts where" says whether a parameter acts everywhere, with TransformerEngine's layers
(on GPUs) or on GPUs alone; what is used elsewhere is said when the run starts. Parameters without
effect are listed last: those that are accepted, with a line at start, and those that pass at their
default, and at other values that mean "off", and end the command in one line otherwise.
"""


def document() -> str:
    """The whole page."""
    parts = [HEAD, "## `megatron sft` and `megatron pt`\n"]
    parts += _groups(SftArguments, set())
    parts += ["`megatron pt` has other defaults:\n", _changed_defaults(PtArguments)]
    shared = {each.name for each in dataclasses.fields(SftArguments)}
    parts += ["## `megatron rlhf`\n", "Beside the flags of `megatron sft`:\n"]
    parts += _groups(RlhfArguments, shared)
    parts += ["It has other defaults:\n", _changed_defaults(RlhfArguments)]
    parts += ["## `swift export`\n", "Beside what it shares with training:\n"]
    parts += _groups(ExportArguments, shared - _own(ExportArguments))
    parts += ["## Without effect yet\n", _planned()]
    return "\n".join(parts)


def _own(cls: type[Any]) -> set[str]:
    """Fields that mean something of their own for `cls`: the same name, another text."""
    theirs, ours = field_docs(SftArguments), field_docs(cls)
    return {name for name in ours if name in theirs and ours[name] != theirs[name]}


def _groups(cls: type[Any], without: set[str]) -> list[str]:
    planned, docs, hints = planned_flags(cls), field_docs(cls), get_type_hints(cls)
    names = {each.name for each in dataclasses.fields(cls)}
    fields = {each.name: each for each in dataclasses.fields(cls)}
    tables = []
    for group in cls.__mro__:
        own = vars(group).get("__annotations__", {})
        if group is PtArguments or not own:
            continue
        rows = [
            _row(fields[name], docs[name], hints[name], names)
            for name in own
            if name in names and name not in planned and name not in without
        ]
        if rows:
            title = (inspect.getdoc(group) or "").splitlines()[0]
            head = "| name | type | default | meaning | acts where | alias |\n|--|--|--|--|--|--|"
            tables.append("\n".join([f"### {title}\n", head, *rows, ""]))
    return tables


def _row(each: dataclasses.Field[Any], text: str, hint: Any, names: set[str]) -> str:
    aliases = [
        f"not `{alias}`" if alias in NEGATED else f"`{alias}`"
        for alias, name in aliases_of(names).items()
        if name == each.name
    ]
    cells = [f"`{each.name}`", _type(hint), _default(each), " ".join(text.split())]
    cells.append(acts_where(each.name))
    return "| " + " | ".join([*(_escape(cell) for cell in cells), ", ".join(aliases)]) + " |"


def _type(hint: Any) -> str:
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _type(next(member for member in members if member is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin is list:
        return f"list of {_type(members[0])}"
    return "JSON" if hint is dict or origin is dict else str(hint.__name__)


def _default(each: dataclasses.Field[Any]) -> str:
    value = default_of(each)
    if value is None:
        return "None"
    if isinstance(value, list):
        return f"`{' '.join(value)}`" if value else "none"
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def _changed_defaults(cls: type[Any]) -> str:
    """A line for each flag of `megatron sft` whose default is another for `cls`."""
    theirs = {each.name: each for each in dataclasses.fields(cls)}
    return "".join(
        f"- `{each.name}`: {_default(theirs[each.name])}\n"
        for each in dataclasses.fields(SftArguments)
        if default_of(each) != default_of(theirs[each.name])
    )


def _planned() -> str:
    groups = planned_flags(SftArguments)
    docs = field_docs(SftArguments)
    rows = ["| name | default | meaning | acts where |", "|--|--|--|--|"]
    for each in dataclasses.fields(SftArguments):
        if each.name in groups:
            cells = [f"`{each.name}`", _default(each), docs[each.name]]
            accepted = each.name in ACCEPTED | NOTED
            other = f"refused at any other value: {refusal(each.name, groups)}"
            cells.append(acts_where(each.name) if accepted else other)
            rows.append("| " + " | ".join(_escape(" ".join(cell.split())) for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(document(), end="")
