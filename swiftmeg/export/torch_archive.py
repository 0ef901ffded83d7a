"""What torch.save() writes, with checksums that zlib computes.

torch's own checksums take more time than everything else of a conversion together.
"""

import ctypes
import pickle
import zipfile
from typing import BinaryIO

import torch

FORMAT = b"3\n"
"""The version of torch's archives."""


def write_tensor(tensor: torch.Tensor, file: BinaryIO) -> None:
    """Append an archive with a tensor on the CPU to `file`; torch.load() reads it."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    if not whole:  # all that lies under a tensor would be written
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    with zipfile.ZipFile(_Stream(file), "w") as archive:
        records = _Records(archive)
        torch.serialization._save(
            tensor, records, pickle, torch.serialization.DEFAULT_PROTOCOL, False
        )
        records.write_record("version", FORMAT, len(FORMAT))


class _Stream:
    """A file that can only be appended to, so that offsets count from the archive's beginning."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes, /) -> int:
        return self._file.write(data)

    def close(self) -> None:
        """The file goes on."""

    def flush(self) -> None:
        self._file.flush()


class _Records:
    """torch's archive writer, as far as torch.save() needs it."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def write_record(self, name: str, data: str | bytes | torch.UntypedStorage, size: int) -> None:
        """Write `size` bytes of `data` under `name`."""
        content: bytes | memoryview
        if isinstance(data, torch.UntypedStorage):
            content = memoryview((ctypes.c_char * size).from_address(data.data_ptr())).cast("B")
        else:
            content = data.encode() if isinstance(data, str) else data
        self._archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
