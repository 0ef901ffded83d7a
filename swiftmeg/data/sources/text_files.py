"""Text files as bytes, compressed or not."""

import codecs
import gzip
import io
from pathlib import Path
from typing import cast

import pyarrow as pa

from swiftmeg.errors import UserError

COMPRESSED = (".gz", ".zst")

_BUFFER = 2**20
_HEAD = 64
_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a text file, which may be packed by gzip or zstd; its text must not be UTF-16.

    Raises UserError for that, OSError and others of the libraries for a damaged file.
    """
    raw = path.open("rb")
    file = _unpacked(raw, path.suffix.lower())
    head = file.peek(_HEAD)[:_HEAD]
    if head.startswith(_BOMS) or _every_other_zero(head):
        file.close()
        raise UserError(
            f"{path}: is UTF-16 or UTF-32, not UTF-8: convert it, for example by "
            "iconv -f UTF-16 -t UTF-8"
        )
    return file


def _unpacked(raw: io.BufferedReader, suffix: str) -> io.BufferedReader:
    if suffix == ".gz":
        unpacked: object = gzip.GzipFile(fileobj=raw)
    elif suffix == ".zst":
        unpacked = pa.CompressedInputStream(raw, "zstd")
    else:
        return raw
    return io.BufferedReader(cast(io.RawIOBase, unpacked), _BUFFER)


def _every_other_zero(head: bytes) -> bool:
    """Whether bytes without a mark are UTF-16 text of Latin letters."""
    empty_half = not any(head[::2]) or not any(head[1::2])
    return len(head) >= 8 and any(head) and empty_half
