"""What is used in place of what was asked, where a flag has no effect: one line each at start."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swiftmeg import platform
from swiftmeg.args.rules import DISCARDED, NEEDS, TRANSFORMER_ENGINE
from swiftmeg.args.unsupported import ACCEPTED, NOTED, accepted_flags
from swiftmeg.errors import typed
from swiftmeg.models.hf import HFModel

BIASES = ("add_qkv_bias", "attention_output_bias", "mlp_bias", "expert_bias")


@dataclass(frozen=True)
class Setting:
    """What decides whether a flag acts."""

    args: Any
    model: HFModel
    fused: bool
    """The layers are TransformerEngine's."""
    gpu: bool

    def given(self, name: str) -> Any:
        """The value of a flag."""
        return getattr(self.args, name)


@dataclass(frozen=True)
class Note:
    """What is used where `flag` was given and `when` holds."""

    flag: str
    when: Callable[[Setting], bool]
    used: str
    where: str = "with TransformerEngine"
    """Where the flag acts."""


def _native(name: str, *values: Any) -> Callable[[Setting], bool]:
    return lambda it: not it.fused and it.given(name) in values


NOTES = (
    Note("attention_backend", _native("attention_backend", "flash", "fused", "unfused"),
         "it chooses TransformerEngine's kernels; native layers attend by torch's"),
    Note("attention_softmax_in_fp32", _native("attention_softmax_in_fp32", False),
         "torch's attention computes the softmax in fp32"),
    Note("no_masked_softmax_fusion", lambda it: True,
         "the kernels of attention have no softmax apart, fused or not", "accepted, neutral"),
    Note("moe_permute_fusion", _native("moe_permute_fusion", True),
         "the kernel is TransformerEngine's; native layers sort tokens by torch"),
    Note("moe_grouped_gemm",
         lambda it: it.given("moe_grouped_gemm") and not (it.gpu and it.given("bf16")),
         "the kernel is one for bf16 on GPUs; experts are computed one after the other",
         "on GPUs"),
    Note("no_rope_fusion", _native("no_rope_fusion", False),
         "the fused kernel is TransformerEngine's; native layers turn heads by torch"),
    Note("no_gradient_accumulation_fusion",
         lambda it: it.given("no_gradient_accumulation_fusion") is False and not it.fused
         and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None,
         "the kernel for native layers is apex's, which is not installed",
         "with TransformerEngine or apex"),
    Note("lora_bias",
         lambda it: it.given("lora_bias") == "all"
         and not any(it.model.megatron_args.get(name) for name in BIASES),
         "the model has no biases", "everywhere"),
)  # fmt: skip
"""Flags that are accepted everywhere and act in some places."""

_WHERE = {note.flag: note.where for note in NOTES} | {
    **dict.fromkeys(TRANSFORMER_ENGINE, "with TransformerEngine"),
    **dict.fromkeys(("fp16", "distributed_backend", "moe_enable_deepep"), "on GPUs"),
    "transformer_impl": "everywhere; transformer_engine on GPUs",
    "recompute_modules": f"everywhere; {', '.join(DISCARDED)} with TransformerEngine",
}


def acts_where(name: str) -> str:
    """Where the flag of a training command acts, if it is not refused."""
    if name in ACCEPTED | NOTED:
        return f"accepted, neutral: {(ACCEPTED | NOTED)[name]}"
    needs_precise = any(
        rule.flag == name and set(rule.others) & set(TRANSFORMER_ENGINE) for rule in NEEDS
    )
    return "with TransformerEngine" if needs_precise else _WHERE.get(name, "everywhere")


_PER_SAMPLE = (
    "aux_loss balances the experts of each sample, as seq_aux_loss does: over the tokens of a "
    "micro-batch it would depend on how samples are put together"
)


def notes(args: Any, sources: dict[str, str], model: HFModel, backend: str) -> list[str]:
    """A line for each flag that was given and has no effect, with what is used.

    `backend` is the layer backend of the training: `native` or `transformer_engine`.
    """
    it = Setting(args, model, backend == "transformer_engine", platform.has_cuda() or args.dry_run)
    lines = [
        f"--{note.flag} {typed(it.given(note.flag))} has no effect: {note.used}"
        for note in NOTES
        if sources.get(note.flag) == "flag" and note.when(it)
    ]
    lines += [
        f"--{name} {typed(getattr(args, name))} has no effect: {ACCEPTED[name]}"
        for name in accepted_flags(type(args))
        if sources.get(name) == "flag"
    ]
    kinds, weights = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    if model.megatron_args.get("num_experts") and any(
        kind == "aux_loss" and weight for kind, weight in zip(kinds, weights, strict=True)
    ):
        lines.append(_PER_SAMPLE)
    return lines
