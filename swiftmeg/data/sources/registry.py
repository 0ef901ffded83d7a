"""Datasets known by name: where they lie and how their rows are to be read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from swiftmeg.data.standard_row import Row
from swiftmeg.errors import UserError


@dataclass(frozen=True)
class Subset:
    """A part of a dataset.

    `hub_subset` is its name on the hub (None: the hub's default). `columns`, beside those of the
    dataset, are renamed first; then `preprocess` changes a raw row before its format is told. A
    weak subset is not part of `:all`.
    """

    hub_subset: str | None = None
    preprocess: Callable[[Row], Row] | None = None
    weak: bool = False
    columns: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset under its ModelScope id, Hugging Face id or local path (at least one of them).

    `columns` renames columns before the format is told; `split`, a name or several, is what is
    loaded from a hub.
    """

    ms_id: str | None = None
    hf_id: str | None = None
    path: Path | None = None
    subsets: Mapping[str, Subset] = field(default_factory=lambda: {"default": Subset()})
    columns: Mapping[str, str] = MappingProxyType({})
    split: str | tuple[str, ...] = "train"

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of `split`."""
        return (self.split,) if isinstance(self.split, str) else self.split


_by_name: dict[str, DatasetInfo] = {}


def register_dataset(info: DatasetInfo, *, name: str | None = None) -> None:
    """Make a dataset known under its hub ids and, if given, under `name`.

    Raises UserError if another dataset has one of these names, or the dataset has none.
    """
    names = [known for known in (name, info.ms_id, info.hf_id) if known]
    if not names:
        raise UserError("register_dataset: the dataset needs a hub id, or a name for its path")
    for known in names:
        if _by_name.get(known, info) != info:
            raise UserError(f"register_dataset: {known} is already registered")
    _by_name.update(dict.fromkeys(names, info))


def find_dataset(name: str) -> DatasetInfo | None:
    """Return the dataset registered as `name`, or whose hub id ends in `/name`, or None."""
    if name in _by_name:
        return _by_name[name]
    ids = (known for known in _by_name if not known.startswith("/"))
    return next((_by_name[known] for known in ids if known.endswith("/" + name)), None)


def find_path(path: Path) -> DatasetInfo | None:
    """Return the dataset that is registered with this file or folder, or None."""
    wanted = path.resolve()
    infos = (info for info in _by_name.values() if info.path is not None)
    return next((info for info in infos if info.path and info.path.resolve() == wanted), None)


def registered_names() -> list[str]:
    """Return the registered names in order of registration."""
    return list(_by_name)


_EMPTY_THINK = "<think>\n\n</think>\n\n"


def _empty_think(row: Row) -> Row:
    return {**row, "response": _EMPTY_THINK + row["response"]}


def _no_think(row: Row) -> Row:
    return {**_empty_think(row), "query": row["query"] + " /no_think"}


register_dataset(
    DatasetInfo(path=Path(__file__).with_name("self_cognition.jsonl")), name="self-cognition"
)
register_dataset(
    DatasetInfo(
        ms_id="swift/self-cognition",
        hf_id="modelscope/self-cognition",
        subsets={
            "default": Subset(),
            "qwen3": Subset(preprocess=_no_think, weak=True),
            "empty_think": Subset(preprocess=_empty_think, weak=True),
        },
    )
)
register_dataset(
    DatasetInfo(ms_id="AI-ModelScope/alpaca-gpt4-data-zh", hf_id="llm-wizard/alpaca-gpt4-data-zh")
)
register_dataset(
    DatasetInfo(ms_id="AI-ModelScope/alpaca-gpt4-data-en", hf_id="vicgalle/alpaca-gpt4")
)
