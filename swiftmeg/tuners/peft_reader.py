"""PEFT folders read: every tensor has a place in the model, or the command ends. No Megatron."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swiftmeg.args.adapter_config import CONFIG, RESIDUAL_STARTS, AdapterConfig, read_config
from swiftmeg.errors import UserError
from swiftmeg.export.hf_files import TIED_HEAD, listed
from swiftmeg.models.family import Row
from swiftmeg.models.hf import HFModel
from swiftmeg.tuners.peft_format import (
    EMBEDDING,
    PREFIX,
    WEIGHTS,
    Factors,
    HFAdapters,
    expert_stacks,
    live_name,
    weight_names,
)

Tensors = dict[str, Tensor]

_FACTOR = re.compile(r"(.*)\.lora_(embedding_)?([AB])(\.weight)?")
_BIAS = re.compile(r"(.*)\.lora_B\.bias")
_MAGNITUDE = re.compile(r"(.*)\.lora_magnitude_vector(\.weight)?")
_TOKENS = re.compile(r"(.*)\.token_adapter\.trainable_tokens_delta")
_COPY = re.compile(r"(.*)\.(modules_to_save|original_module)(\.\w+)")
"""What PEFT writes besides of a module that is trained whole in a model with added rows."""


def read_adapters(folder: Path, model: HFModel) -> tuple[AdapterConfig, HFAdapters]:
    """A PEFT folder's config, and its tensors by the HF weights of `model` that they change.

    UserError for what is missing, broken, no LoRA, not known or not of this model.
    """
    config = read_config(folder)
    return config, to_adapters(config, _read_tensors(folder / WEIGHTS), model)


def _read_tensors(path: Path) -> Tensors:
    """The tensors of a file, names without PEFT's prefix."""
    if not path.is_file() and path.with_name("adapter_model.bin").is_file():
        raise UserError(
            f"{path.parent} has its tensors in adapter_model.bin: load it with PEFT and save it by "
            "save_pretrained, which writes safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None


def to_adapters(config: AdapterConfig, tensors: Tensors, model: HFModel) -> HFAdapters:
    """A PEFT folder's tensors by the HF weights that they change; UserError for any other."""
    return _Reader(config, model).read(tensors)


class _Reader:
    """Finds the place of each tensor, and keeps those that have none."""

    def __init__(self, config: AdapterConfig, model: HFModel) -> None:
        self.config = config
        names = weight_names(model)
        if model.config.get("tie_word_embeddings"):
            names.add(TIED_HEAD)
        self.published = {live_name(name): name for name in names} | {name: name for name in names}
        self.stacks = expert_stacks(model)
        self.found = HFAdapters()
        self.parts: dict[str, Tensors] = defaultdict(dict)
        """Module -> its A, B, bias and magnitude."""
        self.unknown: set[str] = set()

    def read(self, tensors: Tensors) -> HFAdapters:
        """Everything in `tensors`."""
        for key, tensor in tensors.items():
            self._sort(key, tensor, tensors)
        for place, parts in self.parts.items():
            self._pair(place, parts)
        self._refuse_residual_experts()
        modules = {name.rpartition(".")[0] for name in self.found.trained}
        for end in self.config.modules_to_save:
            if not any(module == end or module.endswith(f".{end}") for module in modules):
                raise UserError(
                    f"--adapters {self.config.folder}: {CONFIG} lists {end} in modules_to_save, "
                    f"but {WEIGHTS} has no such module: copy both files again"
                )
        if self.unknown:
            raise UserError(
                f"--adapters {self.config.folder}: {len(self.unknown)} tensors have no place in "
                f"the model: {listed(self.unknown)}: name the model that the adapter was made for"
            )
        return self.found

    def _refuse_residual_experts(self) -> None:
        """UserError for a start of experts that PEFT does not have."""
        experts = {name for rows in self.stacks.values() for row in rows for name in row.hf}
        if self.config.start in RESIDUAL_STARTS and experts & self.found.factors.keys():
            raise UserError(
                f"--adapters {self.config.folder}: init_lora_weights {self.config.start} of "
                f"experts ({listed(experts & self.found.factors.keys())}): PEFT finds their base "
                "weights no more: save it anew with path_initial_model_for_weight_conversion=..."
            )

    def _sort(self, key: str, tensor: Tensor, tensors: Tensors) -> None:
        plain = re.sub(r"(\.token_adapter)?\.base_layer\.", ".", key)
        name = None if self._is_wrapped(key, tensors) else self.published.get(plain)
        if match := _FACTOR.fullmatch(key):
            self.parts[match[1]][match[3]] = tensor
        elif match := _BIAS.fullmatch(key):
            self.parts[match[1]]["bias"] = tensor
        elif match := _MAGNITUDE.fullmatch(key):
            self.parts[match[1]]["magnitude"] = tensor
        elif match := _TOKENS.fullmatch(key):
            self._add_tokens(key, match[1], tensor)
        elif match := _COPY.fullmatch(key):
            trained = tensors.get(match[1] + match[3])
            same = trained is not None and torch.equal(trained, tensor)
            if trained is None or (match[2] == "modules_to_save" and not same):
                self.unknown.add(key)
        elif name is not None and tensor.dim():
            self.found.trained[name] = tensor
        else:
            self.unknown.add(key)

    def _is_wrapped(self, key: str, tensors: Tensors) -> bool:
        """Whether PEFT's model has the weight under another name, beside an adapter."""
        module = key.rpartition(".")[0]
        ends = ("lora_A.weight", "lora_embedding_A", "token_adapter.trainable_tokens_delta")
        return any(f"{module}.{end}" in tensors for end in ends)

    def _add_tokens(self, key: str, module: str, values: Tensor) -> None:
        name = self.published.get(f"{module}.weight")
        ends = (end for end in self.config.token_indices if f".{module}".endswith(f".{end}"))
        # The tied head repeats the embedding's rows.
        rows = self.config.token_indices.get(next(ends, EMBEDDING))
        if name is None or rows is None or values.dim() != 2 or len(rows) != len(values):
            self.unknown.add(key)
        else:
            self.found.tokens[name] = rows, values

    def _pair(self, place: str, parts: Tensors) -> None:
        """Take a module's parts, or those of the parameter of all experts."""
        module = place.removesuffix(".base_layer")
        plain = self.published.get(f"{module}.weight")
        stack = f"{module}.{'gate_up_proj' if self._is_first(place) else 'down_proj'}"
        if not {"A", "B"} <= parts.keys():
            self.unknown.update(f"{place}.lora_{part}" for part in parts)
        elif plain is not None:
            self._take(plain, module, parts)
        elif stack in self.stacks and parts.keys() == {"A", "B"} and not self.config.dora:
            rows = self.stacks[stack]
            scale = self._scale(stack, parts, len(rows))
            for name, (a, b) in _unstack(rows, parts):
                self.found.factors[name] = Factors(a, b, self.config.alpha_of(stack), scale)
        else:
            self.unknown.update(f"{place}.lora_{part}" for part in parts)

    def _take(self, name: str, module: str, parts: Tensors) -> None:
        parameter = f"{module}.weight"
        key = parameter if self.config.targets_parameter(parameter) else module
        if self.config.dora != ("magnitude" in parts):
            raise UserError(
                f"--adapters {self.config.folder}: {CONFIG} says use_dora "
                f"{str(self.config.dora).lower()}, but {WEIGHTS} has "
                f"{'no' if self.config.dora else 'a'} {module}.lora_magnitude_vector: copy both "
                "files again"
            )
        scale = self._scale(key, parts)
        self.found.factors[name] = Factors(
            parts["A"], parts["B"], self.config.alpha_of(key), scale, parts.get("magnitude")
        )
        if "bias" in parts:
            bias = name.removesuffix("weight") + "bias"
            if bias not in self.published:
                raise UserError(
                    f"--adapters {self.config.folder}: {module}.lora_B.bias (lora_bias true) needs "
                    f"{bias}, which the model does not have: it cannot be merged, nor by PEFT"
                )
            self.found.added[bias] = parts["bias"].float() * scale

    def _scale(self, key: str, parts: Tensors, experts: int = 1) -> float:
        """What B @ A is multiplied by; UserError where the factors have another rank than said."""
        rank = self.config.rank_of(key)
        a, b = tuple(parts["A"].shape), tuple(parts["B"].shape)
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank * experts:
            raise UserError(
                f"--adapters {self.config.folder}: the factors of {key} are {a} and {b}, but "
                f"{CONFIG} says rank {rank}: copy both files again"
            )
        return self.config.alpha_of(key) / (rank**0.5 if self.config.rslora else rank)

    def _is_first(self, place: str) -> bool:
        """PEFT nests the wrappers of two parameters, the first inside; one alone is not nested."""
        if place.endswith(".base_layer") or f"{place}.base_layer" in self.parts:
            return place.endswith(".base_layer")
        return any(name.endswith("gate_up_proj") for name in self.config.target_parameters)


def _unstack(rows: list[Row], pair: Tensors) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each expert's factors from PEFT's pair for all; inverse of what is written."""
    a = pair["A"].unflatten(0, (len(rows), -1))
    b = pair["B"].unflatten(1, (-1, len(rows))).movedim(-1, 0)
    for row, mine, whole in zip(rows, a, b, strict=True):
        for name, part in zip(row.hf, whole.chunk(len(row.hf)), strict=True):
            yield name, (mine, part.contiguous())
