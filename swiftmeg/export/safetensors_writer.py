"""Write safetensors files of a Hugging Face folder one tensor at a time, by many ranks at once."""

import ctypes
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

SINGLE = "model.safetensors"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


FilePlan = tuple[str, list[TensorInfo]]
"""A file's name and the tensors in it."""


def assign_files(
    writers: list[list[TensorInfo]], max_shard_bytes: int
) -> tuple[list[list[FilePlan]], dict[str, Any]]:
    """Decide which file every tensor goes to when several writers write side by side.

    `writers` holds, per writer, its tensors in writing order. Returns per writer its files, and
    the content of the index.
    """
    groups: list[tuple[int, list[TensorInfo]]] = []
    for writer, tensors in enumerate(writers):
        content: list[TensorInfo] = []
        filled = 0
        for tensor in tensors:
            if content and filled + tensor.nbytes > max_shard_bytes:
                groups.append((writer, content))
                content, filled = [], 0
            content.append(tensor)
            filled += tensor.nbytes
        if content:
            groups.append((writer, content))
    total = len(groups)
    plans: list[list[FilePlan]] = [[] for _ in writers]
    weight_map: dict[str, str] = {}
    for number, (writer, content) in enumerate(groups, 1):
        file = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        plans[writer].append((file, content))
        weight_map.update(dict.fromkeys((tensor.name for tensor in content), file))
    size = sum(tensor.nbytes for tensors in writers for tensor in tensors)
    return plans, {"metadata": {"total_size": size}, "weight_map": weight_map}


def write_files(
    folder: Path, plan: list[FilePlan], tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Write `tensors`, which come in the order of `plan`, holding one tensor at a time."""
    for file, content in plan:
        _write_file(folder / file, content, tensors)
    assert next(tensors, None) is None, "a tensor came that no file was planned for"


def _write_file(
    path: Path, content: list[TensorInfo], tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """One safetensors file: header length, JSON header, data, the wider dtypes first.

    The safetensors library needs all tensors of a file in memory; its format does not.
    """
    start, places = _header(content)
    with path.open("wb") as out:
        out.write(start)
        for expected in content:
            name, tensor = next(tensors)
            found = TensorInfo(name, tuple(tensor.shape), tensor.dtype)
            assert found == expected, f"{found} came where {expected} was planned"
            out.seek(places[name])
            _write(out, tensor)


def write_slices(
    folder: Path, plan: list[FilePlan], slices: Iterator[tuple[str, int, torch.Tensor]]
) -> None:
    """Write parts [number] of the tensors in `plan`, whose other parts other ranks write.

    Every rank that has a part of a file writes the same header.
    """
    places: dict[str, tuple[Path, int]] = {}
    starts: dict[Path, bytes] = {}
    for file, content in plan:
        starts[folder / file], found = _header(content)
        places |= {name: (folder / file, place) for name, place in found.items()}
    for name, number, tensor in slices:
        path, place = places[name]
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as out:
            out.write(starts[path])
            out.seek(place + number * tensor.nbytes)
            _write(out, tensor)


def _header(content: list[TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and the place in it of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in sorted(content, key=lambda info: -info.dtype.itemsize):
        header[info.name] = {
            "dtype": _DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    places = {info.name: first + header[info.name]["data_offsets"][0] for info in content}
    return len(text).to_bytes(8, "little") + text, places


def _write(out: BinaryIO, tensor: torch.Tensor) -> None:
    data = tensor.contiguous()
    # numpy() would bind the memory for good, which others want to give back.
    out.write((ctypes.c_char * data.nbytes).from_address(data.data_ptr()))
