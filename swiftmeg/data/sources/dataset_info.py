"""Files that register datasets: JSON lists with one entry per dataset (--custom_dataset_info)."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from swiftmeg.data.sources.formats import MESSAGES
from swiftmeg.data.sources.readers import strict_object
from swiftmeg.data.sources.registry import DatasetInfo, Subset, register_dataset
from swiftmeg.data.standard_row import Row, RowError
from swiftmeg.errors import UserError
from swiftmeg.trust import Untrusted, stays_inside

_DESCRIPTIONS = ("help", "tags", "huge_dataset")
"""Keys that tell people about the dataset, and the reading of it nothing."""

_KEYS = (
    "ms_dataset_id",
    "hf_dataset_id",
    "dataset_path",
    "dataset_name",
    "subsets",
    "split",
    "columns",
    "messages",
    *_DESCRIPTIONS,
)
_SUBSET_KEYS = ("name", "subset", "columns", "messages", "is_weak_subset")


@dataclass(frozen=True)
class MessageNames:
    """How messages are written in a dataset; a call writes those of a raw row as usual."""

    role_key: str = "role"
    content_key: str = "content"
    user_role: str = "user"
    assistant_role: str = "assistant"
    system_role: str = "system"

    def __call__(self, row: Row) -> Row:
        return {
            column: [self._message(item) for item in value]
            if column in MESSAGES and isinstance(value, list)
            else value
            for column, value in row.items()
        }

    def _message(self, item: Any) -> Any:
        if not isinstance(item, dict) or self.role_key not in item:
            return item
        roles = {
            self.user_role: "user",
            self.assistant_role: "assistant",
            self.system_role: "system",
        }
        role = item[self.role_key]
        named = {"role": roles.get(role, role) if isinstance(role, str) else role}
        if self.content_key in item:
            named["content"] = item[self.content_key]
        return {k: v for k, v in item.items() if k not in (self.role_key, self.content_key)} | named


def register_files(files: Iterable[str]) -> None:
    """Register the datasets of JSON files; a relative `dataset_path` starts at its file's folder.

    Raises UserError, naming file, entry (from 1) and key, for whatever is wrong with one.
    """
    for file in files:
        path = Path(file).expanduser()
        for number, entry in enumerate(_entries(path), 1):
            try:
                name, info = _dataset(entry, path.resolve().parent)
                register_dataset(info, name=name)
            except UserError as error:
                place = f"--custom_dataset_info {path}: entry {number}"
                raise UserError(f"{place}: {error}") from None


def _entries(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text, object_pairs_hook=strict_object)
    except OSError as error:
        found = f"cannot be read ({error.strerror}): name an existing JSON file"
    except RecursionError:
        found = "is nested too deeply"
    except RowError as error:
        found = f"is refused: {error}"
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
        found = f"is not JSON ({error})"
    else:
        if isinstance(entries, list):
            return entries
        found = f"holds {_kind(entries)}: accepted: a list of objects with {', '.join(_KEYS)}"
    raise UserError(f"--custom_dataset_info {path}: {found}")


def _dataset(entry: Any, folder: Path) -> tuple[str | None, DatasetInfo]:
    """The name that an entry gives its dataset, if any, and the dataset."""
    _check_keys(entry, _KEYS)
    name, ms_id, hf_id, written = (
        _text(entry, key)
        for key in ("dataset_name", "ms_dataset_id", "hf_dataset_id", "dataset_path")
    )
    if not (ms_id or hf_id or written):
        raise UserError(
            "the dataset has no place: give ms_dataset_id, hf_dataset_id or dataset_path"
        )
    for key in ("dataset_name", "ms_dataset_id", "hf_dataset_id"):
        if set(entry.get(key) or "") & {":", "#"}:
            raise UserError(
                f"{key} {entry[key]!r}: must not contain ':' and '#', which --dataset reads as "
                "the marks of subsets and of a number of rows"
            )
    names = _message_names(entry)
    subsets = {
        key: subset if subset.preprocess else replace(subset, preprocess=names)
        for key, subset in _subsets(entry).items()
    }
    splits = _splits(entry)
    path = None
    if written:
        path = folder / Path(written).expanduser()
        for place in (written, *(subset.hub_subset or "." for subset in subsets.values())):
            if not stays_inside(place) and place != str(path):
                raise Untrusted(
                    f"dataset_path {written!r}: {place!r} is outside of the file's folder, "
                    f"{folder}: write an absolute path, or name the data by --dataset"
                )
        if not path.exists():
            raise UserError(f"dataset_path {written!r}: there is no file or folder {path}")
        for subset in subsets.values():
            if not (path / (subset.hub_subset or "")).exists():
                raise UserError(
                    f"subsets: there is no subfolder {subset.hub_subset} in {path}; subsets of a "
                    "dataset_path are its subfolders"
                )
        if splits != ("train",):
            raise UserError(
                "split: a dataset_path has no splits, and is read whole: drop the key, or give "
                "each file an entry"
            )
        if not (name or ms_id or hf_id):
            name = str(path)
    columns = _columns(entry)
    return name, DatasetInfo(ms_id, hf_id, path, subsets, columns, splits)


def _subsets(entry: Mapping[str, Any]) -> dict[str, Subset]:
    listed = entry.get("subsets")
    if listed is None:
        return {"default": Subset()}
    if not isinstance(listed, list) or not listed:
        raise UserError(f"subsets {_shown(listed)}: accepted: a list of names or objects")
    subsets: dict[str, Subset] = {}
    for value in listed:
        try:
            name, subset = _subset({"subset": value} if isinstance(value, str) else value)
        except UserError as error:
            raise UserError(f"subsets: {error}") from None
        if name in subsets:
            raise UserError(f"subsets: {name} is given twice")
        subsets[name] = subset
    return subsets


def _subset(value: Any) -> tuple[str, Subset]:
    _check_keys(value, _SUBSET_KEYS)
    hub_subset = _text(value, "subset") or "default"
    name = _text(value, "name") or hub_subset
    if set(name) & set(":/#") or name == "all":
        raise UserError(
            f"name {name!r}: cannot be asked for by --dataset: give a name other than `all`, "
            "without ':', '/' and '#'"
        )
    weak = value.get("is_weak_subset", False)
    if not isinstance(weak, bool):
        raise UserError(f"is_weak_subset {_shown(weak)}: accepted: true, false")
    chosen = None if hub_subset == "default" else hub_subset
    names = _message_names(value)
    return name, Subset(chosen, preprocess=names, weak=weak, columns=_columns(value))


def _message_names(entry: Mapping[str, Any]) -> MessageNames | None:
    value = entry.get("messages")
    if value is None:
        return None
    accepted = [each.name for each in fields(MessageNames)]
    if (
        not isinstance(value, dict)
        or not value.keys() <= set(accepted)
        or not all(isinstance(word, str) and word for word in value.values())
    ):
        raise UserError(
            f"messages {_shown(value)}: accepted: an object of names for {', '.join(accepted)}"
        )
    return MessageNames(**value)


def _splits(entry: Mapping[str, Any]) -> tuple[str, ...]:
    value = entry.get("split")
    listed = ["train"] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(split, str) and split for split in listed)
    ):
        raise UserError(f"split {_shown(value)}: accepted: a name or a list of names")
    return tuple(listed)


def _columns(entry: Mapping[str, Any]) -> dict[str, str]:
    columns = entry.get("columns")
    if columns is None:
        return {}
    if not isinstance(columns, dict) or not all(isinstance(v, str) for v in columns.values()):
        raise UserError(f'columns {_shown(columns)}: accepted: {{"old": "new"}}')
    return columns


def _text(entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not (isinstance(value, str) and value):
        raise UserError(f"{key} {_shown(value)}: accepted: a string that is not empty")
    return value


def _check_keys(entry: Any, accepted: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{_kind(entry)}: accepted: an object with {', '.join(accepted)}")
    for key in entry:
        if key not in accepted:
            raise UserError(f"unknown key {key!r}: accepted: {', '.join(accepted)}")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return kinds.get(type(value), _shown(value))


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
