"""A PEFT folder beside a loaded model: all of it is used by PEFT, or refused by name."""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open

from swiftmeg.args.adapter_config import read_raw, refuse_unknown
from swiftmeg.errors import UserError

_TABLES = ("embed_tokens", "lm_head")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def tokenizer_folder(adapters: list[str], folder: Path) -> Path:
    """Where the tokenizer is: in the adapter's folder if it came with one, else in the model's."""
    for named in adapters:
        beside = Path(named).expanduser()
        if any((beside / name).is_file() for name in _TOKENIZER):
            return beside
    return folder


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with a PEFT folder beside it, and as many rows in its tables as that has.

    UserError for keys and tensors that PEFT would pass over, and bases that it cannot find again.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    known = {each.name for each in dataclasses.fields(LoraConfig)}
    refuse_unknown(read_raw(folder), folder, known | {"modules_to_tie", "target_modules_to_tie"})
    try:
        rows = _rows(folder)
        if rows is not None and rows != model.config.vocab_size:
            model.resize_token_embeddings(rows, mean_resizing=False)
        with warnings.catch_warnings(action="ignore"):  # of PEFT, about what is checked below
            both = PeftModel.from_pretrained(model, folder)
            tensors = load_peft_weights(str(folder), device=str(model.device))
            result = set_peft_model_state_dict(both, tensors)
    except Exception as error:  # PEFT and transformers raise of many kinds
        line = (str(error).splitlines() or [""])[0]
        raise UserError(f"--adapters {folder}: cannot be loaded ({line})") from None
    copies = [".original_module.", ".modules_to_save."]
    if model.config.tie_word_embeddings:
        copies.append(".lm_head.token_adapter.")  # the embedding's rows once more
    left = [name for name in result.unexpected_keys if not any(part in name for part in copies)]
    missing = [
        name
        for name in result.missing_keys
        if ("lora_" in name or "token_adapter" in name) and copies[-1] not in name
    ]
    for names, what in ((left, "have no place in the model"), (missing, "are not in the folder")):
        if names:
            raise UserError(
                f"--adapters {folder}: {len(names)} tensors {what}: {', '.join(names[:5])}: name "
                "the model that the adapter was made for, or copy the folder again"
            )
    return both


def _rows(folder: Path) -> int | None:
    """How many rows the embedding or head has that is stored in a folder; None if neither is."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            plain = re.sub(r"(\.token_adapter)?\.base_layer\.", ".", name)
            if plain.endswith(tuple(f".{table}.weight" for table in _TABLES)):
                return int(file.get_slice(name).get_shape()[0])
    return None
