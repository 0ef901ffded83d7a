"""Flags of mixture-of-experts layers, latent attention and multi-token prediction."""

import importlib.util
from dataclasses import dataclass, fields
from typing import Any, Literal

from swiftmeg.args.layer_pattern import layer_pattern
from swiftmeg.args.megatron import MegatronFlags
from swiftmeg.errors import UserError, typed
from swiftmeg.models.hf import HFModel


@dataclass
class ExpertShapeArguments:
    """Mixture of experts: what must agree with config.json"""

    num_experts: int | None = None
    """Experts of a layer."""
    moe_layer_freq: str | None = None
    """Which layers have experts: N for every Nth, or a list such as [0]*3+[1]*58."""
    moe_ffn_hidden_size: int | None = None
    """Hidden size of an expert."""
    moe_shared_expert_intermediate_size: int | None = None
    """Hidden size of all shared experts together."""
    moe_router_topk: int | None = None
    """Experts of a token."""
    moe_router_pre_softmax: bool | None = None
    """Softmax over all experts before some are chosen, not over the chosen ones."""
    moe_router_score_function: Literal["sigmoid", "softmax"] | None = None
    """Scores of the router."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor on the scores of the chosen experts."""
    moe_router_enable_expert_bias: bool | None = None
    """A bias per expert that takes part in the choice only and balances the load."""


@dataclass
class LatentShapeArguments:
    """Multi-latent attention: what must agree with config.json"""

    multi_latent_attention: bool | None = None
    """Attention over compressed keys and values."""
    q_lora_rank: int | None = None
    """Size of the compressed queries."""
    kv_lora_rank: int | None = None
    """Size of the compressed keys and values."""
    qk_head_dim: int | None = None
    """Part of a query or key head without positions."""
    qk_pos_emb_head_dim: int | None = None
    """Part of a query or key head with positions."""
    v_head_dim: int | None = None
    """Size of a value head."""


@dataclass
class ExpertParallelArguments(MegatronFlags):
    """Expert parallelism"""

    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share every expert. None: --tensor_model_parallel_size."""


@dataclass
class ExpertArguments(MegatronFlags):
    """Mixture of experts"""

    moe_router_dtype: Literal["none", "fp32", "fp64"] = "fp32"
    """Dtype of the router; none is that of the model."""
    moe_router_bias_update_rate: float = 1e-3
    """How far a step moves the bias of an expert that got too many or too few tokens."""
    moe_router_load_balancing_type: (
        list[Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"]] | None
    ) = None
    """How experts are balanced. None: as in config.json, else aux_loss. aux_loss and seq_aux_loss
    are one here: over each sample, so that layouts agree, not over the tokens of a micro-batch."""
    moe_aux_loss_coeff: list[float] | None = None
    """Weight of the balancing loss, one for each type. None: as in config.json, else 0."""
    moe_z_loss_coeff: float | None = None
    """Weight of the loss that keeps the router's logits small. None: 0."""
    moe_expert_capacity_factor: float | None = None
    """Most tokens of an expert in a micro-batch, as a multiple of the mean; further ones are
    dropped. None drops none."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens --moe_expert_capacity_factor drops: those of the lowest score, or the last."""
    moe_pad_expert_input_to_capacity: bool = False
    """Fill every expert's input up to its capacity."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex", "alltoall_seq"] = "alltoall"
    """How tokens reach their experts; flex needs DeepEP."""
    moe_enable_deepep: bool = False
    """Move tokens with DeepEP's kernels; needs --moe_token_dispatcher_type flex."""
    moe_grouped_gemm: bool = True
    """Compute a rank's experts in one grouped product instead of one after the other."""
    moe_permute_fusion: bool | None = None
    """Sort tokens by expert in one kernel, which is TransformerEngine's. None: where it can run."""
    moe_shared_expert_overlap: bool = False
    """Compute shared experts while tokens travel."""


@dataclass
class PredictionArguments(MegatronFlags):
    """Multi-token prediction"""

    mtp_num_layers: int | None = None
    """Modules that predict further tokens: those of the model, or 0 to leave them out."""


@dataclass
class PredictionLossArguments(MegatronFlags):
    """Multi-token prediction: loss"""

    mtp_loss_scaling_factor: float = 0.1
    """Weight of the loss of the modules that predict further tokens."""


_WITHOUT_EFFECT = {
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "moe_aux_loss_coeff": [0.0],
    "moe_z_loss_coeff": 0.0,
    "moe_expert_capacity_factor": None,
}
"""Flags that must be at these values, or None, where the model has no experts."""

BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss")
"""Types of balancing that are losses with a weight."""


def complete_experts(args: Any, sources: dict[str, str], model: HFModel) -> None:
    """Resolve what depends on the model and the machine; UserError for what cannot be."""
    built = model.megatron_args
    if not built.get("num_experts"):
        for name, value in _WITHOUT_EFFECT.items():
            given = getattr(args, name)
            if given not in (None, value):
                raise UserError(
                    f"--{name} {typed(given)}: --model {model.folder} has no experts: drop it"
                )
        return
    _balance(args, sources, model)
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        if sources["sequence_parallel"] == "flag":
            raise UserError(
                "--sequence_parallel false: experts under --tensor_model_parallel_size "
                f"{args.tensor_model_parallel_size} need it: drop it"
            )
        args.sequence_parallel = True
        sources["sequence_parallel"] = "experts with tensor parallelism"
    if args.moe_shared_expert_overlap and not built.get("moe_shared_expert_intermediate_size"):
        args.moe_shared_expert_overlap = False
        sources["moe_shared_expert_overlap"] = "no shared experts"
    _check_dispatcher(args)


def _balance(args: Any, sources: dict[str, str], model: HFModel) -> None:
    """Fill the types of balancing and their weights, one each."""
    built = model.megatron_args
    if args.moe_router_load_balancing_type is None:
        kind = built.get("moe_router_load_balancing_type", "aux_loss")
        args.moe_router_load_balancing_type = [kind]
        sources["moe_router_load_balancing_type"] = "config.json"
    kinds = args.moe_router_load_balancing_type
    if args.moe_aux_loss_coeff is None:
        weight = 0.0
        if any(kind in BALANCING for kind in kinds):
            weight = float(model.config.get("router_aux_loss_coef") or 0.0)
        args.moe_aux_loss_coeff = [weight] * len(kinds)
        if "router_aux_loss_coef" in model.config:
            sources["moe_aux_loss_coeff"] = "config.json"
    weights = args.moe_aux_loss_coeff
    if len(weights) != len(kinds):
        raise UserError(
            f"--moe_aux_loss_coeff {typed(weights)}: there must be one for each of "
            f"--moe_router_load_balancing_type {typed(kinds)}"
        )
    for kind, weight in zip(kinds, weights, strict=True):
        if weight < 0:
            raise UserError(f"--moe_aux_loss_coeff {weight}: must be at least 0")
        if weight and kind not in BALANCING:
            raise UserError(
                f"--moe_aux_loss_coeff {weight}: --moe_router_load_balancing_type {kind} has no "
                "loss: set it to 0"
            )
    if len(kinds) > 1 and not set(kinds) <= set(BALANCING):
        raise UserError(
            f"--moe_router_load_balancing_type {typed(kinds)}: only {', '.join(BALANCING)} go "
            "together: choose one type"
        )
    factor = args.moe_expert_capacity_factor
    if factor is not None and factor <= 0:
        raise UserError(f"--moe_expert_capacity_factor {factor}: must be above 0")
    if factor is not None and not set(kinds) <= {"aux_loss", "seq_aux_loss", "none"}:
        raise UserError(
            f"--moe_expert_capacity_factor {factor} does not go with "
            f"--moe_router_load_balancing_type {typed(kinds)}: use aux_loss, seq_aux_loss or none"
        )
    if args.moe_pad_expert_input_to_capacity:
        largest = built["num_experts"] / built["moe_router_topk"]
        if factor is None or factor > largest:
            raise UserError(
                "--moe_pad_expert_input_to_capacity true needs --moe_expert_capacity_factor of at "
                f"most {largest:g}, where every expert has room for all tokens: set it"
            )


def _check_dispatcher(args: Any) -> None:
    kind = args.moe_token_dispatcher_type
    if kind == "alltoall_seq":
        raise UserError(
            "--moe_token_dispatcher_type alltoall_seq: it is gone from Megatron, whose alltoall "
            "does the same: use alltoall"
        )
    if args.moe_enable_deepep and kind != "flex":
        raise UserError("--moe_enable_deepep true needs --moe_token_dispatcher_type flex: set it")
    if kind == "flex" and importlib.util.find_spec("deep_ep") is None:
        raise UserError(
            "--moe_token_dispatcher_type flex needs DeepEP's kernels, the package deep_ep, which "
            "is not installed: use alltoall"
        )
    if args.moe_shared_expert_overlap and kind == "allgather":
        raise UserError(
            "--moe_shared_expert_overlap true needs --moe_token_dispatcher_type alltoall: set it"
        )


def expert_flags(args: Any, built: dict[str, Any], fused: bool) -> dict[str, Any]:
    """What replaces the resolved flags on Megatron's command line.

    `fused` says whether TransformerEngine's kernels are there.
    """
    if not built.get("num_experts"):
        return dict.fromkeys(_names(ExpertParallelArguments) + _names(ExpertArguments))
    balanced = any(args.moe_aux_loss_coeff)
    return {
        "moe_router_dtype": None if args.moe_router_dtype == "none" else args.moe_router_dtype,
        "moe_permute_fusion": fused and args.moe_permute_fusion is not False,
        # Megatron asks for a GPU of a certain kind, which the native experts do not need.
        "moe_grouped_gemm": None,
        "moe_router_load_balancing_type": args.moe_router_load_balancing_type
        if balanced or args.moe_router_load_balancing_type == ["sinkhorn"]
        else ["none"],
        "moe_aux_loss_coeff": args.moe_aux_loss_coeff if balanced else None,
        "moe_z_loss_coeff": args.moe_z_loss_coeff or None,
    }


def prediction_flags(built: dict[str, Any]) -> dict[str, Any]:
    """What replaces the flags of multi-token prediction on Megatron's command line."""
    count = built.get("mtp_num_layers") or None
    if count:
        return {"mtp_num_layers": count}
    return dict.fromkeys(_names(PredictionArguments) + _names(PredictionLossArguments))


def check_pattern(model: HFModel, wanted: str | None) -> None:
    """UserError unless `wanted`, the value of --moe_layer_freq, is what the model has."""
    if wanted is None:
        return
    layers = model.megatron_args["num_layers"]
    pattern = layer_pattern(wanted, layers)
    if pattern is None:
        raise UserError(
            f"--moe_layer_freq {wanted}: write a number N for experts in every Nth layer, or a "
            "list of 0 and 1 such as [0]*3+[1]*58"
        )
    if not model.megatron_args.get("num_experts"):
        if wanted != "1":
            raise UserError(
                f"--moe_layer_freq {wanted}: --model {model.folder} has no experts: drop it"
            )
    elif pattern != (has := layer_pattern(model.megatron_args["moe_layer_freq"], layers)):
        raise UserError(
            f"--moe_layer_freq {wanted} contradicts --model {model.folder}, whose layers with "
            f"experts are {has}: drop it"
        )


def _names(group: type[Any]) -> list[str]:
    return [each.name for each in fields(group)]
