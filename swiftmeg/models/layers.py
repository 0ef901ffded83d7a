"""The transformer layers of a model: one spec over either layer backend."""

import importlib.util
from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from swiftmeg import platform
from swiftmeg.errors import UserError
from swiftmeg.models.arguments import LayerSwitches
from swiftmeg.models.attention_kernel import Attention, kernel_for
from swiftmeg.models.linear_attention import GatedDeltaNet, GatedDeltaNetSubmodules
from swiftmeg.models.mla import LatentAttention, latent_attention_submodules
from swiftmeg.models.moe import MoELayer, Router
from swiftmeg.models.native import NativeSpecProvider
from swiftmeg.models.native.mlp import GatedMLP
from swiftmeg.models.norms import NormAcrossHeads, NormAfterLayer
from swiftmeg.models.residual import add_residual
from swiftmeg.models.routing import choice_of
from swiftmeg.models.self_attention import PackedSelfAttention


def choose_backend(transformer_impl: str | None) -> str:
    """Resolve `--transformer_impl`: TransformerEngine where it can run, native layers elsewhere.

    `local` and `native` both mean the native layers. UserError if TransformerEngine is asked for
    and missing.
    """
    usable = platform.has_cuda() and importlib.util.find_spec("transformer_engine") is not None
    if transformer_impl is None:
        return "transformer_engine" if usable else "native"
    if transformer_impl == "transformer_engine" and not usable:
        missing = "a GPU" if not platform.has_cuda() else "the package transformer-engine"
        raise UserError(
            f"--transformer_impl transformer_engine needs {missing}: install it, or drop the flag "
            "to use the native layers"
        )
    return "native" if transformer_impl == "local" else transformer_impl


def _provider(backend: str) -> BackendSpecProvider:
    if backend == "transformer_engine":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return NativeSpecProvider()


def _biased(linear: type) -> type:
    """A linear layer that has a bias whatever `config.add_bias_linear` says."""

    class Biased(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    Biased.__name__ = f"Biased{linear.__name__}"
    return Biased


def moe_layers(config: TransformerConfig) -> list[bool]:
    """For each layer of the model whether it has experts in place of the MLP."""
    count, pattern = config.num_layers, config.moe_layer_freq
    if config.num_moe_experts is None:
        return [False] * count
    if isinstance(pattern, int):
        return [layer % pattern == 0 for layer in range(count)]
    if len(pattern) != count or not set(pattern) <= {0, 1}:
        raise UserError(
            f"--moe_layer_freq {pattern}: must be {count} numbers, 1 for a layer with experts and "
            "0 for one without, or a number N for experts in every Nth layer"
        )
    return [bool(entry) for entry in pattern]


def linear_layers(config: TransformerConfig) -> list[bool]:
    """For each layer of the model whether it has a gated delta net in place of attention."""
    pattern = config.linear_attention_freq or [0] * config.num_layers
    return [bool(entry) for entry in pattern[: config.num_layers]]  # predictions follow


def block_spec(
    config: TransformerConfig,
    backend: str,
    vp_stage: int | None = None,
    switches: LayerSwitches | None = None,
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage and the final norm."""
    switches = switches or LayerSwitches()
    provider = _provider(backend)
    layers = list(zip(moe_layers(config), linear_layers(config), strict=True))
    kinds = {
        (experts, linear): _layer_spec(config, provider, switches, experts=experts, linear=linear)
        for experts, linear in set(layers)
    }
    model = [kinds[each] for each in layers]
    norm = provider.layer_norm(rms_norm=True, has_residual=False)
    return TransformerBlockSubmodules(
        layer_specs=[model[number] for number in _numbers_here(config, vp_stage)], layer_norm=norm
    )


def prediction_spec(
    config: TransformerConfig,
    backend: str,
    vp_stage: int | None = None,
    switches: LayerSwitches | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """The modules that predict further tokens, each around a layer like the decoder's last.

    It has attention, whatever the last one has.

    None where this pipeline stage has none of them.
    """
    if not get_mtp_num_layers_to_build(config, vp_stage=vp_stage):
        return None
    provider = _provider(backend)
    norm = provider.layer_norm(rms_norm=True, has_residual=False)
    last = moe_layers(config)[-1]
    module = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            layer_norm=norm,
            eh_proj=provider.column_parallel_linear(),
            mtp_model_layer=_layer_spec(
                config, provider, switches or LayerSwitches(), experts=last
            ),
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[module] * config.mtp_num_layers)


def _numbers_here(config: TransformerConfig, vp_stage: int | None) -> list[int]:
    """The layers of this pipeline stage, counted from 0."""
    if config.pipeline_model_parallel_layout is not None:
        layout = config.pipeline_model_parallel_layout
        return list(layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage))
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))


def _layer_spec(
    config: TransformerConfig,
    provider: BackendSpecProvider,
    switches: LayerSwitches,
    *,
    experts: bool,
    linear: bool = False,
) -> ModuleSpec:
    """One decoder layer: attention or a gated delta net (`linear`), then a gated MLP or experts.

    Norms stand before or after them.

    Checkpoints of both backends are interchangeable: where norms stand alone that
    TransformerEngine fuses into the linear layer behind them, they are stored under the names of
    the fused layer.
    """
    fused = provider.fuse_layernorm_and_linear()
    norm = provider.layer_norm(rms_norm=True, has_residual=True)
    if not switches.norm_before:
        norm = IdentityOp
    latent = config.multi_latent_attention
    fused_norms = {}
    if not latent:
        first = "in_proj" if linear else "linear_qkv"
        fused_norms["input_layernorm."] = f"self_attention.{first}.layer_norm_"
    if not experts:
        fused_norms["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    after = provider.layer_norm(rms_norm=True, has_residual=False)
    return ModuleSpec(
        module=NormAfterLayer if switches.norm_after else TransformerLayer,
        params={"norm": after} if switches.norm_after else {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused and not latent else norm,
            self_attention=(
                _delta_net(provider) if linear else _attention(config, provider, switches)
            ),
            self_attn_bda=add_residual,
            pre_mlp_layernorm=IdentityOp if fused and not experts else norm,
            mlp=_experts(config, provider, switches) if experts else _mlp(provider, switches),
            mlp_bda=add_residual,
            sharded_state_dict_keys_map={} if fused else fused_norms,
        ),
    )


def _attention(
    config: TransformerConfig, provider: BackendSpecProvider, switches: LayerSwitches
) -> ModuleSpec:
    row = provider.row_parallel_linear()
    row = _biased(row) if switches.attention_output_bias else row
    params = {"attn_mask_type": AttnMaskType.causal}
    backend = "native" if isinstance(provider, NativeSpecProvider) else "transformer_engine"
    core_attention = kernel_for(Attention.of(config, backend)).module()
    if config.multi_latent_attention:
        return ModuleSpec(
            module=LatentAttention,
            params=params,
            submodules=latent_attention_submodules(provider, core_attention, row),
        )
    fused = provider.column_parallel_layer_norm_linear() if switches.norm_before else None
    q_norm, k_norm = _qk_norms(config, provider, switches)
    return ModuleSpec(
        module=PackedSelfAttention,
        params=params,
        submodules=SelfAttentionSubmodules(
            linear_qkv=fused or provider.column_parallel_linear(),
            core_attention=core_attention,
            linear_proj=row,
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )


def _delta_net(provider: BackendSpecProvider) -> ModuleSpec:
    fused = provider.column_parallel_layer_norm_linear()
    return ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=fused or provider.column_parallel_linear(),
            out_proj=provider.row_parallel_linear(),
        ),
    )


def _qk_norms(
    config: TransformerConfig, provider: BackendSpecProvider, switches: LayerSwitches
) -> tuple[Any, Any]:
    """The norms of queries and of keys."""
    if not config.qk_layernorm:
        return IdentityOp, IdentityOp
    if switches.qk_norm_across_heads:
        heads, groups = config.num_attention_heads, config.num_query_groups
        return partial(NormAcrossHeads, heads=heads), partial(NormAcrossHeads, heads=groups)
    norm = provider.layer_norm(rms_norm=True, for_qk=True)
    return norm, norm


def _mlp(provider: BackendSpecProvider, switches: LayerSwitches) -> Any:
    mlp = get_mlp_module_spec_for_backend(provider)
    submodules = mlp.keywords["submodules"]
    if isinstance(provider, NativeSpecProvider):
        mlp = partial(GatedMLP.as_mlp_submodule, submodules=submodules)
    if not switches.norm_before:
        submodules.linear_fc1 = provider.column_parallel_linear()
    if switches.mlp_bias:
        submodules.linear_fc1 = _biased(submodules.linear_fc1)
        submodules.linear_fc2 = _biased(submodules.linear_fc2)
    return mlp


def _experts(
    config: TransformerConfig, provider: BackendSpecProvider, switches: LayerSwitches
) -> Any:
    """Router, experts, and shared experts where the model has them.

    Experts are of one kind in both backends, for the sake of their parameters' names: where they
    are not to be computed together, the native ones run one after the other. In bfloat16 the native
    ones stand in TransformerEngine's layers too: its own split the work and launch every expert by
    itself, which takes the processor longer than the products take the GPU. So do those with
    biases, which TransformerEngine's add once on every expert-tensor-parallel rank.
    """
    layer = get_moe_module_spec_for_backend(
        provider, num_experts=config.num_moe_experts, moe_grouped_gemm=True
    )
    submodules = layer.keywords["submodules"]
    submodules.router = partial(
        Router,
        choice=choice_of(switches, config.moe_router_num_groups),
        has_bias=switches.expert_bias,
        fp32=switches.router_fp32,
    )
    together = config.bf16 and not config.fp8 and not config.fp4
    if together or switches.expert_bias or not config.moe_grouped_gemm:
        submodules.experts = NativeSpecProvider().grouped_mlp_modules(False)
    if switches.expert_bias:
        experts = submodules.experts.keywords["submodules"]
        experts.linear_fc1 = _biased(experts.linear_fc1)
        experts.linear_fc2 = _biased(experts.linear_fc2)
    return partial(MoELayer, submodules=submodules)
