"""What a command runs or sets before it does anything else."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from swiftmeg.data.sources.dataset_info import register_files
from swiftmeg.errors import UserError


def load_plugins(args: Any) -> None:
    """Set the variables of --model_kwargs and run files that plug in.

    These are the files of --external_plugins; those of --custom_dataset_info register datasets.
    """
    for name, value in (getattr(args, "model_kwargs", None) or {}).items():
        os.environ[name.upper()] = str(value)
    for flag in ("external_plugins", "custom_register_path"):
        for file in getattr(args, flag):
            _run(flag, Path(file).expanduser().resolve())
    register_files(getattr(args, "custom_dataset_info", []))


def _run(flag: str, path: Path) -> None:
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--{flag} {path}: not a Python file: name an existing .py file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
