"""Checkpoints are data: what they ask for beyond known classes is refused, and never run."""

import io
import os
import pickle
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

from swiftmeg import checkpoint
from swiftmeg.errors import UserError
from swiftmeg.trust import Untrusted, stays_inside
from swiftmeg.unpickling import INDEX, load_item, read_index

ITEM = "common_state/shard_0_1"


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def write_iteration(folder: Path, item: bytes, file: str = "__0_0.distcp") -> Path:
    """A checkpoint's iteration of one entry that is no tensor, as torch writes it."""
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(item)
    key = MetadataIndex(ITEM)
    place = _StorageInfo(file, 0, len(item))
    index = Metadata({ITEM: BytesStorageMetadata()}, storage_data={key: place})
    (folder / INDEX).write_bytes(pickle.dumps(index))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def malicious(marker: Path) -> dict[str, tuple[Any, str]]:
    """Pickles that would write `marker`, and what each asks for."""
    word = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    return {
        "system": (Call(os.system, word), "posix.system"),
        "eval": (Call(eval, code), "eval"),
        "process": (Call(subprocess.Popen, ["touch", str(marker)]), "(subprocess|commands).Popen"),
        "inside": ({"a": [Call(os.system, word)]}, "posix.system"),
        "torch": (Call(torch.hub.load, str(marker.parent), "f"), "torch.hub.load"),
    }


@pytest.mark.parametrize("kind", ["system", "eval", "process", "inside", "torch"])
def test_code_is_refused_by_name_and_not_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "ran"
    value, name = malicious(marker)[kind]
    whole = write_iteration(tmp_path / "iter_0000001", saved([{"args": Namespace(a=1)}]))
    assert checkpoint.missing(whole) is None
    assert checkpoint.read_common_state(whole) == {"args": Namespace(a=1)}
    (whole / INDEX).write_bytes(pickle.dumps(value))
    with pytest.raises(Untrusted, match=rf"{INDEX} asks for (builtins\.)?{name}"):
        checkpoint.missing(whole)
    other = write_iteration(tmp_path / "iter_0000002", saved([value]))
    assert checkpoint.missing(other) is None
    for read in (checkpoint.damaged, checkpoint.read_common_state):
        with pytest.raises(
            Untrusted, match=rf"0.distcp asks for (builtins\.|__builtin__\.)?{name}"
        ):
            read(other)
    (other / "common.pt").write_bytes(saved(value))
    with pytest.raises(Untrusted, match=r"common.pt asks for"):
        checkpoint.read_common_state(other)
    (other / "common.pt").write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=r"common.pt"):
        checkpoint.read_common_state(other)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.metadata", "dataclass"),
        ("torch", "serialization.pickle.loads"),
        ("torch", "load"),
        ("collections", "OrderedDict.__class__"),
        ("megatron.core.dist_checkpointing.strategies.torch", "pickle"),
    ],
)
def test_an_index_may_name_nothing_else_of_the_modules_it_needs(
    tmp_path: Path, module: str, name: str
) -> None:
    text = b"".join(
        pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in (module, name)
    )
    (tmp_path / INDEX).write_bytes(b"\x80\x04" + text + pickle.STACK_GLOBAL + pickle.STOP)
    with pytest.raises(Untrusted, match=f"asks for {module}.{name}"):
        read_index(tmp_path / INDEX)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\x80\x04}.", b"(lp0", b"I1\n." * 3])
def test_what_is_no_index_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=rf"{INDEX} cannot be read"):
        read_index(tmp_path / INDEX)


def test_an_index_of_wrong_parts_is_none(tmp_path: Path) -> None:
    key = MetadataIndex("a")
    for index in (
        Metadata({}, storage_data={key: _StorageInfo("f", 0, 1)}),
        Metadata({"a": BytesStorageMetadata()}, storage_data={key: _StorageInfo("f", -1, 1)}),
        Metadata({"a": BytesStorageMetadata()}, storage_data={key: _StorageInfo(None, 0, 1)}),
        Metadata({"a": BytesStorageMetadata()}, storage_data=None),
    ):
        (tmp_path / INDEX).write_bytes(pickle.dumps(index))
        with pytest.raises(UserError, match="is no index"):
            read_index(tmp_path / INDEX)


@pytest.mark.parametrize("file", ["../other.distcp", "/etc/passwd", "a/../../b", ""])
def test_an_index_leads_nowhere_outside_of_its_folder(tmp_path: Path, file: str) -> None:
    whole = write_iteration(tmp_path / "iter_0000001", saved([{}]), file)
    with pytest.raises(Untrusted, match="outside of its folder"):
        checkpoint.missing(whole)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        *[(name, True) for name in ("a", "a/b", "./a", "a..b", "..a", "x-00001-of-00002.bin")],
        *[(name, False) for name in ("", "..", "a/..", "../a", "/a", "~/a", "a\\..\\..\\b")],
        *[(name, False) for name in ("C:\\a", "c:a", "\\\\host\\a", "a\0b")],
    ],
)
def test_paths_inside(name: str, inside: bool) -> None:
    assert stays_inside(name) is inside


def test_torch_reads_checkpoints_by_the_same_list(tmp_path: Path) -> None:
    """Whatever reader Megatron takes, the list holds."""
    from tests.ranks import run_ranks

    (found,) = run_ranks(1, _read_with_torch, tmp_path)
    assert found == ["AssertionError", *["Untrusted", {"args": 1}] * 2]
    assert not (tmp_path / "ran").exists()


def _read_with_torch(folder: Path) -> list[Any]:
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    from swiftmeg import upstream

    upstream.apply()
    found: list[Any] = []
    value, _ = malicious(folder / "ran")["system"]
    whole = write_iteration(folder / "iter_0000001", saved({"args": 1}))
    index = shutil.copytree(whole, folder / "iter_0000002")
    (index / INDEX).write_bytes(pickle.dumps(value))
    item = write_iteration(folder / "iter_0000003", saved(value))
    flat = MCoreLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    for each, planner in ((index, flat), (item, flat), (whole, flat), (item, None), (whole, None)):
        state: dict[str, Any] = {ITEM: io.BytesIO()}
        try:
            load(state, storage_reader=FileSystemReader(each), planner=planner, no_dist=True)
            found.append(state[ITEM])
        except CheckpointException as error:
            found += [type(cause).__name__ for cause, _ in error.failures.values()]
    return found


def test_an_item_keeps_what_torch_saves() -> None:
    value = {"a": torch.arange(3), "b": [1, "c"]}
    read = load_item(io.BytesIO(saved(value)), Path("f"))
    assert torch.equal(read["a"], value["a"])
    assert read["b"] == value["b"]
