"""A Hugging Face model folder: found, read and matched to its family."""

import importlib
import os
import textwrap
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from swiftmeg.checkpoint import refuse_unfinished
from swiftmeg.errors import UserError
from swiftmeg.json_files import read_object
from swiftmeg.models import families  # noqa: F401  (registers them)
from swiftmeg.models.arguments import check_sizes
from swiftmeg.models.family import REGISTRY, Family, HFConfig


@dataclass(frozen=True)
class HFModel:
    """A folder with config.json and tokenizer, and the family that its architecture names."""

    folder: Path
    hf_config: Any
    """The transformers config object; it knows the defaults that config.json leaves out."""
    family: Family
    trust_remote_code: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values of `hf_config` that the user set in place of config.json's."""
    source: Path | None = None
    """The model that this folder was made from, with tokens added."""
    mtp_num_layers: int | None = None
    """Prediction modules that the user wants; None where nothing is said about them."""

    @property
    def named(self) -> str:
        """What --model is to say."""
        return str(self.source or self.folder)

    @cached_property
    def config(self) -> HFConfig:
        """config.json with defaults filled in, and `mtp_num_layers` as the user wants it."""
        return self.hf_config.to_dict() | {"mtp_num_layers": self.mtp_num_layers}

    @cached_property
    def megatron_args(self) -> dict[str, Any]:
        """Megatron arguments of this model."""
        try:
            arguments = self.family.to_args(self.config)
            check_sizes(arguments)
        except UserError as error:
            raise UserError(f"--model {self.folder}: {error}") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"--model {self.folder}: config.json cannot be used ({error!r}): repair it, or "
                "download it again"
            ) from None
        return arguments

    @property
    def dtype(self) -> str:
        """Name of the dtype that config.json states; if it states none, float32, or bfloat16 for
        quantised weights."""
        if (dtype := getattr(self.hf_config, "dtype", None)) is not None:
            return str(dtype).removeprefix("torch.")
        return "bfloat16" if self.config.get("quantization_config") else "float32"

    def tokenizer(self) -> Any:
        """The folder's tokenizer; UserError if there is none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # tokenizers raises bare Exceptions
            if needs_trust(error):
                raise UserError(trust_message(self.folder, "the tokenizer")) from None
            raise UserError(
                f"--model {self.folder}: the tokenizer cannot be read ({_reason(error)}): the "
                "folder needs the tokenizer's files as published, e.g. tokenizer.json"
            ) from None


def find_folder(model: str, use_hf: bool = False, revision: str | None = None) -> Path:
    """A local folder as it is, or a hub id downloaded into the hub's cache."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(
                f"--model_revision {revision} needs a hub id, but --model {model} is a folder: "
                "drop it"
            )
        refuse_unfinished("--model", path)
        return path.resolve()
    if path.is_file():
        raise UserError(f"--model {model}: is a file: name the folder of a Hugging Face model")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UserError(f"--model {model}: no such folder, and not a hub id of the form owner/name")
    hub = (
        "Hugging Face"
        if use_hf or os.environ.get("USE_HF", "").lower() in ("1", "true")
        else "ModelScope"
    )
    try:
        library = "huggingface_hub" if hub == "Hugging Face" else "modelscope"
        return Path(importlib.import_module(library).snapshot_download(model, revision=revision))
    except Exception as error:  # hubs raise many kinds; all mean the same to the user
        raise UserError(
            f"--model {model}: no such folder, and {hub} could not deliver it ({_reason(error)}): "
            "download it and name the folder"
        ) from None


def _reason(error: Exception) -> str:
    """The start of a library's message, on one line."""
    return textwrap.shorten(str(error) or repr(error), 200, placeholder=" ...")


def read_model(
    model: str,
    *,
    use_hf: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> HFModel:
    """Find a model and read its config; UserError if it is missing, broken or not supported."""
    folder = find_folder(model, use_hf, revision)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {folder}: there is no config.json in this folder: name the folder of a "
            "Hugging Face model"
        )
    try:
        raw = read_object(folder / "config.json")
    except UserError as error:
        raise UserError(
            f"--model {folder}: config.json cannot be read ({error}): download it again"
        ) from None
    try:
        hf_config = _read_config(folder, raw, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # bad values raise errors of many kinds
        if needs_trust(error):
            raise _remote_code(folder, raw) from None
        raise UserError(
            f"--model {folder}: config.json cannot be read ({_reason(error)}): repair it, or "
            "download it again"
        ) from None
    names = {"architectures": hf_config.architectures}
    family = REGISTRY.find(names, f"--model {folder}")
    return HFModel(folder, hf_config, family, trust_remote_code)


def needs_trust(error: Exception) -> bool:
    """Whether transformers would run code of the folder's own if it were let."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def trust_message(folder: Path, what: str) -> str:
    """What to say where `what` of a folder is code of its own."""
    return (
        f"--trust_remote_code true is needed: {what} of --model {folder} is code in that folder: "
        "read it, and pass the flag if you trust its publisher"
    )


def _remote_code(folder: Path, raw: dict[str, Any]) -> UserError:
    """The error for a configuration that is code, and is not to be run."""
    text = trust_message(folder, "the configuration")
    named = raw.get("architectures")
    if not isinstance(named, list) or not named or named[0] not in REGISTRY.families:
        text += f"; training needs one of {', '.join(sorted(REGISTRY.families))}, not {named}"
    return UserError(text)


def _read_config(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    """The transformers config of a folder; its own code runs only where `trust_remote_code`.

    Families that are published with code of their own are read by a class of transformers' that
    knows the same keys; keys that it does not know stay as they are.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    family = REGISTRY.families.get((raw.get("architectures") or [""])[0])
    if family is None or family.config_class is None or trust_remote_code:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if family.adapt is not None:
        raw = family.adapt(raw)
    raw.pop("model_type", None)
    return CONFIG_MAPPING[family.config_class].from_dict(raw)
