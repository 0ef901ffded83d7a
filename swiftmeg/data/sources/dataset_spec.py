"""The syntax of `--dataset`: `[hf::|ms::]id_or_path[:subset1/subset2][#N]`."""

import re
from dataclasses import dataclass
from pathlib import Path

from swiftmeg.data.sources.readers import EXTENSIONS
from swiftmeg.data.sources.registry import (
    DatasetInfo,
    Subset,
    find_dataset,
    find_path,
    registered_names,
)
from swiftmeg.errors import UserError

_SYNTAX = "accepted: [hf::|ms::]id_or_path[:subset1/subset2][#N]"
_DIGITS = 15
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One dataset of the command line: a local `path`, or a hub `dataset_id`.

    `subsets` are pairs of a name and how to load it; `sample` is the N behind `#`.
    """

    spec: str
    info: DatasetInfo
    subsets: tuple[tuple[str, Subset], ...]
    path: Path | None = None
    dataset_id: str | None = None
    use_hf: bool = False
    sample: int | None = None


def parse_spec(spec: str, use_hf: bool = False) -> Source:
    """Read one `--dataset` value; an existing path is taken literally before anything else.

    `use_hf` chooses the hub of an id without prefix. Raises UserError for a path that does not
    exist, an unknown id or subset, or an N that is no positive number.
    """
    rest, hub = spec, None
    for prefix in ("hf::", "ms::"):
        if spec.startswith(prefix):
            rest, hub = spec.removeprefix(prefix), prefix
    use_hf = hub == "hf::" or (use_hf and hub is None)
    sample = None
    if hub or not _exists(rest):
        rest, mark, number = rest.rpartition("#") if "#" in rest else (rest, "", "")
        if mark:
            sample = _sample(spec, number)
    names: tuple[str, ...] = ()
    if hub or not _exists(rest):
        rest, _, joined = rest.partition(":")
        names = tuple(name for name in joined.split("/") if name)
    if not hub and _exists(rest):
        path = Path(rest).expanduser()
        registered = find_path(path)
        if registered is None:
            return _local(spec, path, names, sample)
        subsets = _registered_subsets(spec, registered, names)
        return Source(spec, registered, subsets, path=path, sample=sample)
    info = find_dataset(rest)
    if info is None and not (hub or _looks_like_hub_id(rest)):
        raise UserError(
            f"--dataset {spec}: there is no file or folder {rest}, and no dataset is registered "
            f"under this name; registered: {', '.join(registered_names())}; {_SYNTAX}"
        )
    info = info or DatasetInfo(ms_id=rest, hf_id=rest)
    if info.path is not None:
        subsets = _registered_subsets(spec, info, names)
        return Source(spec, info, subsets, path=info.path, sample=sample)
    dataset_id = info.hf_id if use_hf else info.ms_id
    if dataset_id is None:
        other = "ms::" if use_hf else "hf::"
        raise UserError(f"--dataset {spec}: is registered for the other hub only: use {other}")
    if find_dataset(rest) is None:
        if names == ("all",):
            raise UserError(
                f"--dataset {spec}: the subsets of {rest} are not registered: name them instead "
                "of :all"
            )
        subsets = tuple((name, Subset(name)) for name in names) or (("default", Subset()),)
    else:
        subsets = _registered_subsets(spec, info, names)
    return Source(spec, info, subsets, dataset_id=dataset_id, use_hf=use_hf, sample=sample)


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError):  # longer than a path may be, or none at all
        return False


def _sample(spec: str, number: str) -> int:
    if len(number) > _DIGITS:
        raise UserError(f"--dataset {spec[:80]}: more than {_DIGITS} digits behind #: lower N")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(
            f"--dataset {spec}: #{number} is not a positive whole number of rows; {_SYNTAX}"
        )
    return int(number)


def _looks_like_hub_id(name: str) -> bool:
    return (
        _HUB_ID.fullmatch(name) is not None
        and not name.startswith(".")
        and not name.endswith(EXTENSIONS)
    )


def _local(spec: str, path: Path, names: tuple[str, ...], sample: int | None) -> Source:
    """A file, or a folder whose subsets are subfolders."""
    if names and not path.is_dir():
        raise UserError(f"--dataset {spec}: {path} is a file and has no subsets")
    # A local copy of a registered dataset is read like the original.
    info = find_dataset(path.name) or DatasetInfo(path=path)
    if names == ("all",):
        names = tuple(sorted(child.name for child in path.iterdir() if child.is_dir()))
    for name in names:
        if not (path / name).is_dir():
            raise UserError(f"--dataset {spec}: there is no subfolder {name} in {path}")
    subsets = tuple((name, Subset(name)) for name in names) or (("default", Subset()),)
    return Source(spec, info, subsets, path=path, sample=sample)


def _registered_subsets(
    spec: str, info: DatasetInfo, names: tuple[str, ...]
) -> tuple[tuple[str, Subset], ...]:
    known = info.subsets
    if names == ("all",):
        return tuple((name, subset) for name, subset in known.items() if not subset.weak)
    if not names:
        if "default" not in known and len(known) > 1:
            raise UserError(
                f"--dataset {spec}: choose among its subsets {', '.join(known)}, such as "
                f"{spec.partition('#')[0]}:{next(iter(known))}, or :all"
            )
        names = ("default",) if "default" in known else tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"--dataset {spec}: unknown subset {unknown[0]}; accepted: {', '.join(known)}, all"
        )
    return tuple((name, known[name]) for name in names)
