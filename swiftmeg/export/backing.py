"""Weights of a model on the CPU in files in place of memory, for conversion.

A model that is only written and read once needs no memory of its own: the kernel writes pages of
mapped files out and drops them when memory gets short, so that a machine can convert models that
are larger than it.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch


def back_by_files(models: list[Any], folder: Path) -> None:
    """Move the parameters on the CPU into files in `folder`; their values are lost.

    The files have no names any more when this returns: they go away with the process. OSError
    where the disk cannot hold them.
    """
    for parameter in (each for chunk in models for each in chunk.parameters()):
        if parameter.device.type != "cpu":
            continue
        handle, name = tempfile.mkstemp(prefix=".weight-", dir=folder)
        try:
            os.posix_fallocate(handle, 0, parameter.nbytes)
            place = torch.from_file(
                name, shared=True, size=parameter.numel(), dtype=parameter.dtype
            )
        finally:
            os.close(handle)
            os.unlink(name)
        parameter.data = place.view(parameter.shape)
