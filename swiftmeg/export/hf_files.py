"""The safetensors files of a Hugging Face folder, read one tensor at a time."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from swiftmeg.errors import UserError
from swiftmeg.export.blocks import Block, StoredPart, whole, within
from swiftmeg.export.fp8 import FP8, SCALE, block_size, check_scales, dequantise, surrounding
from swiftmeg.export.mxfp4 import BLOCKS, SCALES, is_mxfp4
from swiftmeg.export.mxfp4 import check_scales as check_mxfp4_scales
from swiftmeg.export.mxfp4 import dequantise as dequantise_mxfp4
from swiftmeg.json_files import INDEX, read_weight_map
from swiftmeg.models.family import Family, HFConfig, Row

_PREFIX = "model."
_BASE_MODEL = ("embed_tokens.", "layers.", "norm.")
"""How names begin in a folder that was saved without the head, and so without the prefix."""


TIED_HEAD = "lm_head.weight"
"""What a model's head is called where it is the embedding and stored all the same."""

MAPPED_BYTES = 2**25
"""After how much has been read files are opened anew."""


class HFWeights:
    """Read-only view of a folder's safetensors; memory-mapped, so only what is touched is read.

    Names are those of the whole model, also where the folder leaves the prefix `model.` out.
    `config` says how the weights are quantised, if they are.

    Raises UserError, naming the file, for a folder without safetensors, a listed file that is
    missing, or a file that is cut short or not safetensors at all.
    """

    def __init__(self, folder: str | Path, config: HFConfig) -> None:
        self.folder = Path(folder)
        self.packed: set[str] = set()
        """Tensors that are stored as MXFP4 blocks and scales."""
        mxfp4 = is_mxfp4(config)
        self.block = None if mxfp4 else block_size(config)
        self._open: dict[str, Any] = {}
        self._mapped = 0
        self.bytes_read = 0
        """Bytes of the blocks that were taken."""
        self._places: dict[str, tuple[str, str]] = {}
        """Name -> file and the name in it."""
        files = self._files()
        bare = not any(name.startswith(_PREFIX) for name in files)
        for name, file in files.items():
            prefix = _PREFIX if bare and name.startswith(_BASE_MODEL) else ""
            self._places[prefix + name] = file, name
        if mxfp4:
            bases = {name.removesuffix(BLOCKS) for name in self._places if name.endswith(BLOCKS)}
            self.packed = {name for name in bases if name + SCALES in self._places}

    def _files(self) -> dict[str, str]:
        """Map each tensor name to its file."""
        index = self.folder / INDEX
        if index.is_file():
            names = read_weight_map(index)
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
        """Every tensor name in the folder; scales belong to the tensors that they scale."""
        parts = {name + part for name in self.packed for part in (BLOCKS, SCALES)}
        stored = {name for name in self._places if not self._is_scale(name)}
        return stored - parts | self.packed

    def _is_scale(self, name: str) -> bool:
        is_scale = self.block is not None and name.endswith(SCALE)
        return is_scale and name.removesuffix(SCALE) in self._places

    def read(self, name: str, block: Block | None = None) -> torch.Tensor:
        """A tensor, or a block of it, on the CPU in the dtype of the file; fp8 as fp32, scaled."""
        tensor = self._view(name)
        block = block or whole(tensor.shape)
        if tensor.dtype not in FP8:
            return self._take(tensor, block)
        path = self.folder / self._places[name][0]
        if self.block is None or name + SCALE not in self._places:
            missing = "quantization_config in config.json" if self.block is None else name + SCALE
            raise UserError(f"{path}: tensor {name} is fp8, but {missing} is missing")
        scales = self._view(name + SCALE)
        try:
            check_scales(tensor, scales, self.block)
        except ValueError as error:
            raise UserError(f"{path}: tensor {name} cannot be dequantised ({error})") from None
        around, of_scales = surrounding(block, tensor.shape, self.block)
        parts = self._take(tensor, around), self._take(scales, of_scales)
        return dequantise(*parts, self.block)[within(block, around)]

    def _view(self, name: str) -> torch.Tensor:
        """A tensor of a file, of which nothing is read yet."""
        file, stored = self._places[name]
        try:
            tensor: torch.Tensor = self._handle(file).get_tensor(stored)
            return tensor
        except SafetensorError as error:
            path = self.folder / file
            raise UserError(f"{path}: tensor {name} cannot be read ({error})") from None

    def _take(self, tensor: torch.Tensor, block: Block) -> torch.Tensor:
        """A block of a file's tensor, which will be read."""
        taken = tensor[block]
        self.bytes_read += taken.nbytes
        self._mapped += taken.nbytes
        if self._mapped > MAPPED_BYTES:  # what has been read stays in memory until it is closed
            self._open.clear()
            self._mapped = 0
        return taken

    def parts(self, row: Row) -> list[StoredPart]:
        """The HF tensors of a row, or its slice of the one tensor that all experts are in."""
        if row.stack is None or (row.hf[0] in self._places and not row.is_slice):
            return [StoredPart(partial(self.read, name), self._shape(name)) for name in row.hf]
        return self._expert(row.stack, row.expert).chunk(len(row.hf))

    def experts(self, stack: str) -> int:
        """How many experts' weights a tensor holds."""
        return int(self._shape(stack + SCALES if stack in self.packed else stack)[0])

    def _shape(self, name: str) -> torch.Size:
        return self._view(name).shape

    def _expert(self, stack: str, number: int) -> StoredPart:
        """One expert's slice; those stored as MXFP4 are [out, in], but [in, out] elsewhere."""
        this = slice(number, number + 1)
        if stack not in self.packed:
            return StoredPart(
                lambda block: self.read(stack, (this, *block))[0], self._shape(stack)[1:]
            )
        blocks, scales = self._view(stack + BLOCKS), self._view(stack + SCALES)
        try:
            check_mxfp4_scales(blocks, scales)
        except ValueError as error:
            path = self.folder / self._places[stack + BLOCKS][0]
            raise UserError(f"{path}: tensor {stack} cannot be dequantised ({error})") from None

        def read(block: Block) -> torch.Tensor:
            parts = (
                self._take(each, (this, *whole(each.shape[1:])))[0] for each in (blocks, scales)
            )
            return dequantise_mxfp4(*parts).t()[block]

        return StoredPart(read, (scales.shape[2] * 32, scales.shape[1]))


def listed(names: set[str]) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + more


def check_names(family: Family, config: HFConfig, weights: HFWeights) -> list[Row]:
    """The family's plan for this checkpoint; UserError unless it uses every HF tensor once."""
    plan = family.plan(config)
    found = {name for name in weights.names() if not family.is_ignored(name)}
    if config.get("tie_word_embeddings"):
        # Some publishers store the tied head as well; it is the embedding.
        found -= {TIED_HEAD}
    found = _without_predictions(family, config, weights, found)
    wanted: set[str] = set()
    stacks: Counter[str] = Counter()
    for row in plan:
        found -= set(row.copies)
        if row.stack in found and (row.is_slice or not found.intersection(row.hf)):
            stacks[row.stack] += 1
        else:
            wanted.update(row.hf)
    for name, experts in stacks.items():
        if (there := weights.experts(name)) != experts:
            raise UserError(
                f"{weights.folder}: {name} holds {there} experts, but config.json says {experts}: "
                "make the two agree"
            )
    wanted |= stacks.keys()
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


def _without_predictions(
    family: Family, config: HFConfig, weights: HFWeights, found: set[str]
) -> set[str]:
    """`found` without multi-token prediction modules where the user wants none of them."""
    predictions = {name for name in found if family.is_prediction(name, config)}
    if not predictions or config.get("mtp_num_layers"):
        return found
    if config.get("mtp_num_layers") is None:
        count = config.get("num_nextn_predict_layers") or 1
        raise UserError(
            f"{weights.folder}: {len(predictions)} tensors are of multi-token prediction modules "
            f"({listed(predictions)}): pass --mtp_num_layers {count} to keep them, or "
            "--mtp_num_layers 0 to leave them out"
        )
    return found - predictions
