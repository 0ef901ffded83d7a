"""The safetensors files of a Hugging Face folder: read one tensor at a time, write in shards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from swiftmeg.errors import UserError
from swiftmeg.models.family import Family, HFConfig, Row

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HFWeights:
    """Read-only view of a folder's safetensors; memory-mapped, so a tensor costs only itself.

    Raises UserError, naming the file, for a folder without safetensors, a listed file that is
    missing, or a file that is cut short or not safetensors at all.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self.files = self._files()

    def _files(self) -> dict[str, str]:
        """Map each tensor name to its file."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = dict(json.loads(index.read_text())["weight_map"])
            except (json.JSONDecodeError, KeyError) as error:
                raise UserError(f"{index} is not a safetensors index ({error!r})") from None
            for file in sorted(set(names.values())):
                self._handle(file)
            return names
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{self.folder} holds no *.safetensors: convert the weights with transformers' "
                "save_pretrained first"
            )
        return {name: file for file in files for name in self._handle(file).keys()}  # noqa: SIM118

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():
                raise UserError(f"{path} is missing, but {INDEX} lists it: download it again")
            try:
                self._open[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}): download it again") from None
        return self._open[file]

    def names(self) -> set[str]:
        """Every tensor name in the folder."""
        return set(self.files)

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU, in the dtype of the file."""
        try:
            tensor: torch.Tensor = self._handle(self.files[name]).get_tensor(name)
            return tensor
        except SafetensorError as error:
            path = self.folder / self.files[name]
            raise UserError(f"{path}: tensor {name} cannot be read ({error})") from None


def listed(names: set[str]) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + more


def check_names(family: Family, config: HFConfig, weights: HFWeights) -> list[Row]:
    """The family's plan for this checkpoint; UserError unless it uses every HF tensor once."""
    plan = family.plan(config)
    wanted = {name for each in plan for name in each.hf}
    found = {name for name in weights.names() if not family.is_ignored(name)}
    if config.get("tie_word_embeddings"):
        # Some publishers store the tied head as well; it is the embedding.
        found -= {"lm_head.weight"}
    if missing := wanted - found:
        raise UserError(
            f"{weights.folder}: {len(missing)} tensors of {family.architecture} are missing: "
            f"{listed(missing)}"
        )
    if unknown := found - wanted:
        raise UserError(
            f"{weights.folder}: {len(unknown)} tensors have no place in {family.architecture}: "
            f"{listed(unknown)}"
        )
    return plan


def assign_files(
    stages: list[list[tuple[str, int]]], max_shard_bytes: int
) -> tuple[list[list[tuple[str, list[str]]]], dict[str, Any]]:
    """Decide which file every tensor goes to when several writers write side by side.

    `stages` holds, per writer, (tensor name, bytes) in writing order. Returns per writer its
    files as (file name, tensor names), and the content of the index.
    """
    groups: list[tuple[int, list[str]]] = []
    for writer, tensors in enumerate(stages):
        names: list[str] = []
        filled = 0
        for name, size in tensors:
            if names and filled + size > max_shard_bytes:
                groups.append((writer, names))
                names, filled = [], 0
            names.append(name)
            filled += size
        if names:
            groups.append((writer, names))
    total = len(groups)
    plans: list[list[tuple[str, list[str]]]] = [[] for _ in stages]
    weight_map: dict[str, str] = {}
    for number, (writer, names) in enumerate(groups, 1):
        file = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        plans[writer].append((file, names))
        weight_map.update(dict.fromkeys(names, file))
    size = sum(size for tensors in stages for _, size in tensors)
    return plans, {"metadata": {"total_size": size}, "weight_map": weight_map}


def write_files(
    folder: Path,
    plan: list[tuple[str, list[str]]],
    tensors: Iterator[tuple[str, torch.Tensor]],
) -> None:
    """Write `tensors`, which come in the order of `plan`, holding one file's worth at a time."""
    for file, names in plan:
        content: dict[str, torch.Tensor] = {}
        for expected in names:
            name, tensor = next(tensors)
            assert name == expected, f"{name} came where {expected} was planned"
            content[name] = tensor.contiguous()
        save_file(content, folder / file, metadata={"format": "pt"})
    assert next(tensors, None) is None, "a tensor came that no file was planned for"
