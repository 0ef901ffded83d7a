"""The safetensors files of a Hugging Face folder, read one tensor at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from swiftmeg.errors import UserError
from swiftmeg.export.writer import INDEX
from swiftmeg.models.family import Family, HFConfig, Row


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
