"""adapter_config.json of a PEFT folder: what an adapter is, without a word of it left out."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftmeg.errors import UserError
from swiftmeg.json_files import read_object

CONFIG = "adapter_config.json"

_KEEPING_STARTS = (True, False, "true", "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave the base weights as they are."""

RESIDUAL_STARTS = ("pissa", "olora")
"""Those that take the start of the adapter out of the base, the same whenever PEFT reads it."""

_USED = {
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "lora_bias",
    "init_lora_weights",
    "modules_to_save",
    "ensure_weight_tying",
    "trainable_token_indices",
    "target_parameters",
}
_TOLD_BY_TENSORS = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_tie",
    "target_modules_to_tie",
}
_WITHOUT_EFFECT_LATER = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""How the adapter was trained or started (`init_lora_weights` names the start), and parts of
methods that other keys switch on."""

_KNOWN = _USED | _TOLD_BY_TENSORS | _WITHOUT_EFFECT_LATER


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of the tensors beside it."""

    folder: Path
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    """Expressions for the ends of names of modules whose rank is another."""
    alpha_pattern: dict[str, float]
    rslora: bool
    dora: bool
    bias: str
    """Biases that are trained: none, all or lora_only."""
    start: str
    """How the adapter began: one of RESIDUAL_STARTS, mica, gaussian or, whatever else, true."""
    modules_to_save: tuple[str, ...]
    tied: bool
    """Whether adapters of the embedding are the head's, too."""
    token_indices: dict[str, list[int]]
    """Modules with rows that are trained by themselves, and which rows."""
    target_parameters: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return _chosen(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """What a module's B @ A is multiplied by, before it is divided for the rank."""
        return _chosen(self.alpha_pattern, module, self.alpha)

    def targets_parameter(self, name: str) -> bool:
        """Whether the adapter is one of a parameter, not of the module that has it."""
        return any(name == end or name.endswith(f".{end}") for end in self.target_parameters)

    def saves(self, module: str) -> bool:
        """Whether a module was trained whole."""
        return any(module == end or module.endswith(f".{end}") for end in self.modules_to_save)


def fits(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's rank_pattern or alpha_pattern means a module."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _chosen[Value](pattern: dict[str, Value], module: str, default: Value) -> Value:
    return next((value for key, value in pattern.items() if fits(key, module)), default)


def read_raw(folder: Path) -> dict[str, Any]:
    """The content of a PEFT folder's adapter_config.json; UserError if there is none."""
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"--adapters {folder}: there is no {CONFIG} in it: name a folder that PEFT wrote"
        )
    return read_object(folder / CONFIG)


def read_config(folder: Path) -> AdapterConfig:
    """What a LoRA folder says of itself.

    UserError, naming the key, for what is broken, for keys that mean something unknown here, and
    for adapters whose base weights cannot be found again.
    """
    config = read_raw(folder)
    refuse_unknown(config, folder, _KNOWN)
    _check_types(config, folder)
    return AdapterConfig(
        folder=folder,
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        bias=config.get("bias") or "none",
        start=_start(config),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        tied=bool(config.get("ensure_weight_tying")),
        token_indices=_token_indices(config),
        target_parameters=tuple(config.get("target_parameters") or ()),
    )


def refuse_unknown(config: dict[str, Any], folder: Path, known: set[str]) -> None:
    """UserError for no LoRA, for keys with a meaning that is not known, and for lost bases."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"--adapters {folder}: peft_type {config.get('peft_type')}: LORA is known")
    for key in sorted(config.keys() - known):
        if config[key]:
            raise UserError(
                f"--adapters {folder}: {key} {json.dumps(config[key])} in {CONFIG} is not known "
                "here: merge the adapter with PEFT (merge_and_unload) and name the merged model"
            )
    start = config.get("init_lora_weights", True)
    if start not in (*_KEEPING_STARTS, *RESIDUAL_STARTS) and _start(config) == "true":
        raise UserError(
            f"--adapters {folder}: init_lora_weights {start} changed the base weights in a way "
            "that cannot be computed again: save the adapter anew with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...), which makes it one for the plain base"
        )


def _start(config: dict[str, Any]) -> str:
    start = str(config.get("init_lora_weights", True)).lower()
    return start if start in (*RESIDUAL_STARTS, "mica", "gaussian") else "true"


def _token_indices(config: dict[str, Any]) -> dict[str, list[int]]:
    named = config.get("trainable_token_indices") or {}
    return named if isinstance(named, dict) else {"embed_tokens": named}


def _check_types(config: dict[str, Any], folder: Path) -> None:
    for key, right in (
        ("r", _is_rank(config.get("r", 8))),
        ("lora_alpha", _is_number(config.get("lora_alpha", 8))),
        ("rank_pattern", _is_pattern(config.get("rank_pattern"), _is_rank)),
        ("alpha_pattern", _is_pattern(config.get("alpha_pattern"), _is_number)),
        ("bias", config.get("bias") in (None, "none", "all", "lora_only")),
        ("modules_to_save", _is_list(config.get("modules_to_save"), str)),
        ("target_parameters", _is_list(config.get("target_parameters"), str)),
        (
            "trainable_token_indices",
            all(_is_list(rows, int) for rows in _token_lists(config)),
        ),
    ):
        if not right:
            value = json.dumps(config.get(key))
            raise UserError(f"{folder / CONFIG}: {key} {value} is none of PEFT's: copy it again")


def _token_lists(config: dict[str, Any]) -> list[Any]:
    named = config.get("trainable_token_indices") or {}
    return list(named.values()) if isinstance(named, dict) else [named]


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and math.isfinite(value)


def _is_list(value: Any, kind: type) -> bool:
    return value is None or (isinstance(value, list) and all(type(one) is kind for one in value))


def _is_pattern(value: Any, right: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not all(map(right, value.values())):
        return False
    try:
        return bool([re.compile(key) for key in value] or True)
    except re.error:
        return False
