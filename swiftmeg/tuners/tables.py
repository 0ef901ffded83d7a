"""Embedding and head of a model with an adapter: how many rows they have, and whether they are one.

An adapter that was made after `resize_token_embeddings` stores tables with other rows than the
model's; they come with the adapter. An adapter that changes one of two tied tables unties them.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from swiftmeg.args.adapter_config import AdapterConfig
from swiftmeg.errors import UserError
from swiftmeg.export.hf_files import TIED_HEAD
from swiftmeg.models.hf import HFModel
from swiftmeg.models.layout import VOCABULARY
from swiftmeg.tuners.peft_format import EMBEDDING, Factors, HFAdapters


def settle_tables(config: AdapterConfig, adapters: HFAdapters, model: HFModel) -> HFModel:
    """`model` with the vocabulary that the adapter gives it, tied only if its tables stay one.

    Of a tied model's tables `adapters` keep the embedding alone where both stay the same, and what
    differs where they do not. UserError where rows or ties contradict each other.
    """
    changes: dict[str, object] = {}
    if model.config.get("tie_word_embeddings") and not _stay_tied(config, adapters):
        changes["tie_word_embeddings"] = False
    if changes:
        model = _with(model, changes)
    rows = _rows(config, adapters, model)
    if rows != model.config["vocab_size"]:
        changes["vocab_size"] = rows
        model = _with(model, changes)
    return model


def _with(model: HFModel, changes: dict[str, object]) -> HFModel:
    hf_config = copy.deepcopy(model.hf_config)
    for key, value in changes.items():
        setattr(hf_config, key, value)
    return dataclasses.replace(model, hf_config=hf_config, overrides=model.overrides | changes)


def _stay_tied(config: AdapterConfig, adapters: HFAdapters) -> bool:
    """Whether a tied model's embedding is its head after the adapter; drops what is there twice."""
    embedding, head = f"model.{EMBEDDING}.weight", TIED_HEAD
    if {embedding, head} & adapters.factors.keys():
        _share_base(config, adapters, embedding, head)
        return config.tied and _drop_tied_factors(config, adapters, embedding, head)
    if {embedding, head} & adapters.tokens.keys():
        _share_base(config, adapters, embedding, head)
        return _drop_tied_tokens(config, adapters, embedding, head)
    apart = any(config.saves(name.removesuffix(".weight")) for name in (embedding, head))
    if config.tied or not apart:
        _share_base(config, adapters, embedding, head)
        adapters.trained.pop(head, None)
        return True
    one, other = (adapters.trained.get(name) for name in (embedding, head))
    if one is None and other is None:
        return True
    if one is not None and other is not None and torch.equal(one, other):
        del adapters.trained[head]
        return True
    return False


def _share_base(config: AdapterConfig, adapters: HFAdapters, embedding: str, head: str) -> None:
    """Let both tables, one in PEFT's model, have what is stored of either."""
    stored = [adapters.trained[name] for name in (embedding, head) if name in adapters.trained]
    if not stored:
        return
    if not torch.equal(stored[0], stored[-1]):
        raise UserError(
            f"--adapters {config.folder}: {embedding} and {head} differ, but are one in the model: "
            "save the adapter anew from a model whose tie_word_embeddings is false"
        )
    adapters.trained |= {embedding: stored[0], head: stored[0]}


def _drop_tied_factors(
    config: AdapterConfig, adapters: HFAdapters, embedding: str, head: str
) -> bool:
    one, other = adapters.factors.get(embedding), adapters.factors.pop(head, None)
    adapters.trained.pop(head, None)
    if one is None or (other is not None and not _are_tied(one, other)):
        raise UserError(
            f"--adapters {config.folder}: ensure_weight_tying is true, but the adapters of "
            f"{embedding} and {head} differ: save the adapter anew"
        )
    return True


def _are_tied(embedding: Factors, head: Factors) -> bool:
    return torch.equal(embedding.b.t(), head.a) and torch.equal(embedding.a.t(), head.b)


def _drop_tied_tokens(
    config: AdapterConfig, adapters: HFAdapters, embedding: str, head: str
) -> bool:
    one, other = adapters.tokens.get(embedding), adapters.tokens.pop(head, None)
    adapters.trained.pop(head, None)
    if one is None or (other is not None and not (one[0] == other[0] and _same(one, other))):
        raise UserError(
            f"--adapters {config.folder}: trainable_token_indices has other rows for {head} than "
            f"for {embedding}, but they are one in the model: train both alike"
        )
    return True


def _same(one: tuple[list[int], Tensor], other: tuple[list[int], Tensor]) -> bool:
    return torch.equal(one[1], other[1])


def _rows(config: AdapterConfig, adapters: HFAdapters, model: HFModel) -> int:
    """Rows of every table with the adapter; UserError if they differ or some have no values."""
    plan = model.family.plan(model.config)
    tables = [name for row in plan if row.layout is VOCABULARY for name in row.hf]
    own = int(model.config["vocab_size"])
    sizes = {name: size for name in tables for size in _sizes(name, adapters)}
    found = {size for name in tables for size in _sizes(name, adapters)}
    for name, (numbers, _) in adapters.tokens.items():
        last = max(found, default=own) - 1
        if wrong := [number for number in numbers if not 0 <= number <= last]:
            raise UserError(
                f"--adapters {config.folder}: trainable_token_indices names row {wrong[0]} of "
                f"{name}, whose last is {last}: name the model that the adapter was made for"
            )
    if found <= {own}:
        return own
    without = [name for name in tables if name not in adapters.trained]
    if len(found) > 1 or without:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        missing = f"; {', '.join(without)} is not stored with all its rows" if without else ""
        raise UserError(
            f"--adapters {config.folder}: the tables have {own} rows in the model, but with the "
            f"adapter {said}{missing}: save it anew with save_embedding_layers=True"
        )
    return found.pop()


def _sizes(name: str, adapters: HFAdapters) -> set[int]:
    sizes = {len(adapters.trained[name])} if name in adapters.trained else set()
    if (factors := adapters.factors.get(name)) is not None:
        sizes.add(factors.a.shape[1] if is_embedding(name) else len(factors.b))
    return sizes


def is_embedding(name: str) -> bool:
    """Whether a weight is a table that is looked up, whose A has a column for each row."""
    return name.endswith(f"{EMBEDDING}.weight")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a PEFT folder, which tokens were added to."""
    names = (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
        "chat_template.jinja",
    )
    return [folder / name for name in names if (folder / name).is_file()]
