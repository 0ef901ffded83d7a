"""Other spellings of flags: the names of the original's 4.x releases, and slips of its guide."""

from typing import Any

from swiftmeg.errors import UserError, typed

ALIASES = {
    "mcore_model": "load",
    "output_dir": "save",
    "save_steps": "save_interval",
    "eval_steps": "eval_interval",
    "logging_steps": "log_interval",
    "num_train_epochs": "max_epochs",
    "dataloader_num_workers": "num_workers",
    "sequence_parallel_size": "context_parallel_size",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "tuner_type": "train_type",
    "ddp_backend": "distributed_backend",
    "mcore_adapter": "adapter_load",
    "mcore_adapters": "adapter_load",
    "mcore_ref_model": "ref_load",
    "megatron_extra_kwargs": "extra_megatron_kwargs",
    "moe_ffn_hidden_siz": "moe_ffn_hidden_size",
}
"""Alias -> field. A command that has a field of the alias's name keeps that field's meaning."""

NEGATED = {
    "masked_softmax_fusion": "no_masked_softmax_fusion",
    "bias_dropout_fusion": "no_bias_dropout_fusion",
    "bias_activation_fusion": "no_bias_swiglu_fusion",
    "apply_rope_fusion": "no_rope_fusion",
    "gradient_accumulation_fusion": "no_gradient_accumulation_fusion",
    "perform_initialization": "no_initialization",
}
"""Alias -> boolean field that means its opposite."""


def aliases_of(names: set[str]) -> dict[str, str]:
    """The aliases, with their fields, of a command whose fields are `names`."""
    known = (ALIASES | NEGATED).items()
    return {alias: name for alias, name in known if name in names and alias not in names}


def merge_aliases(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """`given` by field names alone; UserError where two spellings of one flag disagree."""
    merged = {name: value for name, value in given.items() if name in names}
    spelled = {name: name for name in merged}
    for alias, name in aliases_of(names).items():
        if alias not in given:
            continue
        value = not given[alias] if alias in NEGATED else given[alias]
        if name in merged and merged[name] != value:
            raise UserError(
                f"--{spelled[name]} {typed(given[spelled[name]])} and --{alias} "
                f"{typed(given[alias])} contradict each other: keep one"
            )
        merged[name], spelled[name] = value, alias
    return merged
