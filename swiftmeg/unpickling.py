"""What is unpickled of a checkpoint: data of known classes, never code.

A Megatron checkpoint keeps its index, `.metadata`, as a pickle, and what is no tensor as archives
with a pickle inside; both can name any function of any module. Here names that no checkpoint needs
are refused before anything is called.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from swiftmeg.errors import UserError
from swiftmeg.trust import Untrusted, stays_inside

INDEX = ".metadata"
"""The index of an iteration: each tensor's size, and where its parts lie."""

COMMON = "common.pt"
"""Where older checkpoints keep the arguments of the run that wrote them."""

_PLACES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""Module -> what an index may name of it; dtypes come beside."""


class _MegatronMetadata(Metadata):
    """The index as Megatron-Core 0.15 wrote it."""


class _MegatronSavePlan:
    """A part of it that nobody reads."""


_RETIRED = {"MCoreMetadata": _MegatronMetadata, "MCoreSavePlan": _MegatronSavePlan}
"""Classes of Megatron's that are no more, by their names."""


class _Unpickler(pickle.Unpickler):
    """Makes objects of known classes only; pickle.UnpicklingError, naming them, for others."""

    def find_class(self, module: str, name: str, /) -> Any:
        if name in _PLACES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in _RETIRED:
            return _RETIRED[name]
        raise _UnknownName(f"{module}.{name}")

    def persistent_load(self, pid: Any, /) -> Any:
        raise _UnknownName("a persistent id")


class _UnknownName(pickle.UnpicklingError):
    """What a pickle asks for and is not given."""


def _refuse(path: Path, name: object) -> Untrusted:
    return Untrusted(
        f"{path} asks for {name}, which no checkpoint needs and which could run code: use "
        "checkpoints from those whom you trust, and write this one again from its source"
    )


def read_index(path: Path) -> Metadata:
    """Read the index of an iteration.

    Untrusted, naming it, for a class or function that no index needs, and for a part that lies
    outside of the index's folder; UserError for a file that is no index.
    """
    try:
        with path.open("rb") as file:
            index = _Unpickler(file).load()
    except _UnknownName as error:
        raise _refuse(path, error) from None
    except Exception as error:  # a damaged pickle raises errors of many kinds
        raise UserError(f"{path} cannot be read ({error!r})") from None
    if not isinstance(index, Metadata) or not _is_whole(index):
        raise UserError(f"{path} cannot be read (it is no index of a checkpoint)")
    for place in index.storage_data.values():
        if not stays_inside(place.relative_path):
            raise Untrusted(
                f"{path} names {place.relative_path!r}, which is outside of its folder: use "
                "checkpoints from those whom you trust"
            )
    return index


def _is_whole(index: Metadata) -> bool:
    """Whether an index says of every entry where it lies."""
    tensors, places = index.state_dict_metadata, index.storage_data
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        return False
    return all(
        isinstance(key, MetadataIndex)
        and isinstance(place, _StorageInfo)
        and isinstance(getattr(place, "relative_path", None), str)
        and all(
            type(n) is int and n >= 0
            for n in (getattr(place, "offset", None), getattr(place, "length", None))
        )
        and key.fqn in tensors
        for key, place in places.items()
    )


def is_item(index: Metadata, key: MetadataIndex) -> bool:
    """Whether an entry of the index is no tensor."""
    return isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata)


def load_item(content: io.BytesIO, path: Path) -> Any:
    """An entry that is no tensor, or a file in torch.save()'s form; `path` is where it lies.

    Untrusted for names beyond those that torch and Megatron know as safe; UserError for damage.
    """
    import megatron.core  # noqa: F401  (tells torch of the classes in Megatron's state)

    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise UserError(f"{path} cannot be read ({_first_line(error)})") from None
        raise _refuse(path, asked[1]) from None
    except Exception as error:  # as above
        raise UserError(f"{path} cannot be read ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
