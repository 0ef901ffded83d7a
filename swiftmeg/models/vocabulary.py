"""--new_special_tokens: a model folder whose tokenizer and vocabulary have grown.

The folder lies in the cache, under a hash of the model and the tokens. It holds the tokenizer,
config.json and the tensors with a row for each token; all other weights are links to the model's
files. What reads a model reads it like any other.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from swiftmeg.cache import cache_root, content_key, get_or_build
from swiftmeg.errors import UserError
from swiftmeg.json_files import INDEX, read_weight_map
from swiftmeg.models.hf import HFModel, read_model
from swiftmeg.models.layout import VOCABULARY

logger = logging.getLogger(__name__)

MULTIPLE = 128
"""The new size of a vocabulary that grows is a multiple of this, as in Megatron-SWIFT."""

_GROWN = "grown.safetensors"
_SPREAD = 1e-9
"""Variance of new rows about the mean, as a share of the old rows': that of transformers."""
_BLOCK = 2**14


def read_tokens(flags: list[str]) -> list[str]:
    """The tokens that --new_special_tokens names: itself, or those in a .txt file, one per line."""
    tokens: list[str] = []
    for word in flags:
        if not word.endswith(".txt"):
            tokens.append(word)
            continue
        try:
            lines = Path(word).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--new_special_tokens {word}: cannot be read ({error})") from None
        tokens += [line.strip() for line in lines if line.strip()]
    if bad := [token for token in tokens if not token.strip()]:
        raise UserError(f"--new_special_tokens: {bad[0]!r} is no token: drop it")
    return list(dict.fromkeys(tokens))


def with_new_tokens(model: HFModel, tokens: list[str]) -> HFModel:
    """`model` with those of `tokens` that its tokenizer or vocabulary lacks, as special tokens.

    The vocabulary grows where it has no rows left for them. Rows of new tokens begin at the mean of
    the others, as those that transformers adds do.
    """
    tokenizer = model.tokenizer()
    known = tokenizer.get_vocab()
    rows = int(model.megatron_args["vocab_size"])
    new = [token for token in tokens if known.get(token, rows) >= rows]
    if not new:
        logger.info("--new_special_tokens: the tokenizer has all %d already", len(tokens))
        return model
    files = [path for path in sorted(model.folder.iterdir()) if path.is_file()]
    state = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = content_key(["grown", str(model.folder), state, new])
    folder = get_or_build(
        cache_root() / "models" / key,
        lambda temporary: _grow(model, tokenizer, new, temporary / model.folder.name),
    )
    grown = read_model(str(folder / model.folder.name), trust_remote_code=model.trust_remote_code)
    return HFModel(
        grown.folder, grown.hf_config, grown.family, grown.trust_remote_code, source=model.folder
    )


def _grow(model: HFModel, tokenizer: Any, new: list[str], folder: Path) -> None:
    folder.mkdir()
    old = len(tokenizer)
    tokenizer.add_tokens(new, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(new)
    config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    rows = int(model.megatron_args["vocab_size"])
    wanted = rows if max(ids) < rows else -(-(max(ids) + 1) // MULTIPLE) * MULTIPLE
    places = _places(model.folder)
    tokenizer.save_pretrained(folder)
    for path in model.folder.iterdir():
        if path.suffix == ".safetensors":
            # transformers takes a single file of the usual name for the whole model.
            (folder / f"base-{path.name}").symlink_to(path.resolve())
        elif path.is_file() and path.name != INDEX and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    config["vocab_size"] = wanted
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    logger.info(
        "--new_special_tokens: %d new tokens; the vocabulary has %d rows (%d before)",
        *(len(new), wanted, rows),
    )
    if not places:
        return  # the weights come from a Megatron checkpoint
    grown = {
        name: _with_rows(model.folder / places[name], name, ids, min(old, rows), rows, wanted)
        for name in _vocabulary_names(model, set(places))
    }
    save_file(grown, folder / _GROWN, metadata={"format": "pt"})
    files = {name: f"base-{file}" for name, file in places.items()} | dict.fromkeys(grown, _GROWN)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=2))


def _places(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    if (folder / INDEX).is_file():
        return read_weight_map(folder / INDEX)
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path.name)
    return places


def _vocabulary_names(model: HFModel, stored: set[str]) -> set[str]:
    """The stored tensors with a row for each token; base models leave the prefix out."""
    rows = [row for row in model.family.plan(model.config) if row.layout is VOCABULARY]
    names = {name for row in rows for name in (*row.hf, *row.copies)} | {"lm_head.weight"}
    return (names | {name.removeprefix("model.") for name in names}) & stored


def _with_rows(
    path: Path, name: str, new: list[int], used: int, rows: int, wanted: int
) -> torch.Tensor:
    """A tensor [rows, hidden] with `wanted` rows, of which the new tokens' have new values."""
    with safe_open(path, framework="pt") as file:
        old = file.get_tensor(name)
    if len(old) != rows or old.dim() != 2 or old.element_size() < 2:
        raise UserError(
            f"--new_special_tokens: {path}: {name} is {tuple(old.shape)} of {old.dtype}, not "
            f"{rows} rows of weights: add the tokens with transformers"
        )
    mean = old[:used].mean(0, dtype=torch.float32)
    square = sum((part.float() - mean).square().sum(0) for part in old[:used].split(_BLOCK))
    spread = (torch.as_tensor(square) / used * _SPREAD).sqrt()
    grown = torch.cat([old, old.new_empty(wanted - rows, old.shape[1])])
    random = torch.Generator().manual_seed(0)
    for row in sorted({*new, *range(rows, wanted)}):
        grown[row] = mean + spread * torch.randn(mean.shape, generator=random)
    return grown


def untrained_rows(args: Any) -> str | None:
    """What to say where the new tokens' rows keep the values that they begin with, else None."""
    words = [*args.modules_to_save, *args.target_modules, args.target_regex or ""]
    if not (args.new_special_tokens and args.is_lora) or any("embed" in word for word in words):
        return None
    return (
        "--new_special_tokens with --train_type lora: the rows of new tokens are not trained: add "
        "--modules_to_save word_embeddings output_layer (word_embeddings alone where they are tied)"
    )
