"""Bytes that a layer keeps from its forward pass for its backward pass.

Counted per token of one context-parallel rank, from what TransformerEngine's and Megatron's
autograd functions save: the input of every product, the queries, keys, values and output of fused
attention (which keeps no score matrix), and the input of the activation.
"""

import argparse
from dataclasses import dataclass

from swiftmeg.models.attention_kernel import Attention, Extent, kernel_for


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps per token, and how much of it recomputation does without."""

    kept: float
    """Bytes from the forward to the backward pass."""
    again: float
    """Bytes that exist during the layer's own backward pass only, because they are computed
    again."""


@dataclass(frozen=True)
class _Part:
    """Bytes per token of a part of a layer, and of its input that stays when it is recomputed."""

    name: str
    size: float


def layer_bytes(args: argparse.Namespace, experts: bool) -> LayerBytes:
    """Bytes per token of one decoder layer of Megatron's namespace `args`."""
    parts = [*_attention(args), *(_experts(args) if experts else _mlp(args))]
    dropped = _recomputed(args, experts)
    kept = sum(part.size for part in parts if part.name not in dropped)
    again = sum(part.size for part in parts if part.name in dropped)
    return LayerBytes(kept, again)


def stream_bytes(args: argparse.Namespace) -> float:
    """Bytes per token of the residual stream between layers on one rank."""
    return element_size(args) * args.hidden_size / _sequence_parts(args)


def element_size(args: argparse.Namespace) -> int:
    """Bytes of one activation."""
    return 2 if args.bf16 or args.fp16 else 4


def _sequence_parts(args: argparse.Namespace) -> int:
    return args.tensor_model_parallel_size if args.sequence_parallel else 1


def _recomputed(args: argparse.Namespace, experts: bool) -> set[str]:
    if args.recompute_granularity != "selective":
        return set()
    modules = set(args.recompute_modules or ["core_attn"])
    dropped = modules & {"core_attn", "layernorm", "mlp", "moe_act", "shared_experts"}
    if "mla_up_proj" in modules:
        dropped.add("mla_up_proj")
    if "mlp" in modules:
        dropped.add("mlp_norm")
    if "moe" in modules and experts:
        dropped |= {"router", "routed", "moe_act", "shared_experts"}
    return dropped


def _attention(args: argparse.Namespace) -> list[_Part]:
    size, tp = element_size(args), args.tensor_model_parallel_size
    stream = stream_bytes(args)
    heads = args.num_attention_heads / tp
    parts = [_Part("stream", stream), _Part("core_attn", _core_attention_bytes(args))]
    if args.multi_latent_attention:
        width = args.qk_head_dim + args.qk_pos_emb_head_dim
        latent = 2 * ((args.q_lora_rank or 0) + args.kv_lora_rank) / _sequence_parts(args)
        return [
            *parts,
            _Part("layernorm", stream),
            _Part("latent", size * latent),
            _Part("mla_up_proj", size * heads * (2 * width + args.v_head_dim)),
            _Part("attention", size * heads * args.v_head_dim),
        ]
    queries = size * heads * args.kv_channels
    keys = size * args.num_query_groups / tp * args.kv_channels
    projected = queries + 2 * keys
    if args.qk_layernorm:
        projected += queries + keys
    if args.layer_backend == "native":
        # Keys and values are repeated for every query head, and norms and products keep inputs of
        # their own.
        projected += 2 * (queries - keys)
    elif "core_attn" in _recomputed(args, experts=False):
        # The values that the recomputation starts from are a view into the whole projection.
        projected += queries + keys
    return [*parts, _Part("normed", stream), _Part("attention", projected + queries)]


def _core_attention_bytes(args: argparse.Namespace) -> float:
    """Bytes per token that the attention kernel keeps, beside queries, keys, values and output."""
    asked = Attention.of(args, args.layer_backend, packed=not args.padded_batches)
    rows = args.micro_batch_size if args.padded_batches else 1
    heads = args.num_attention_heads / args.tensor_model_parallel_size
    return kernel_for(asked).bytes(asked, Extent(heads, args.seq_length, rows, element_size(args)))


def _mlp(args: argparse.Namespace) -> list[_Part]:
    hidden = element_size(args) * args.ffn_hidden_size / args.tensor_model_parallel_size
    stream = stream_bytes(args)
    return [_Part("stream", stream), _Part("mlp_norm", stream), _Part("mlp", 3 * hidden)]


def _experts(args: argparse.Namespace) -> list[_Part]:
    """With balanced experts every rank computes `moe_router_topk` rows for each of its tokens."""
    size = element_size(args)
    stream = stream_bytes(args)
    etp = args.expert_tensor_parallel_size or 1
    tokens = args.moe_router_topk * etp / _sequence_parts(args)
    hidden = size * args.moe_ffn_hidden_size / etp
    router = (4 * 3 + 1) * args.num_experts / _sequence_parts(args)
    parts = [
        _Part("stream", stream),
        _Part("mlp_norm_moe", stream),
        _Part("router", router),
        _Part("routed", tokens * (size * args.hidden_size + 2 * hidden)),
        _Part("moe_act", tokens * hidden),
    ]
    if args.moe_shared_expert_intermediate_size:
        shared = size * args.moe_shared_expert_intermediate_size / args.tensor_model_parallel_size
        parts.append(_Part("shared_experts", 3 * shared))
    return parts
