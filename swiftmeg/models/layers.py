"""The transformer layer of a model: one spec over either layer backend."""

import importlib.util
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from swiftmeg import platform
from swiftmeg.errors import UserError


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
    from swiftmeg.models.native import NativeSpecProvider

    return NativeSpecProvider()


def _biased(linear: type) -> type:
    """A linear layer that has a bias whatever `config.add_bias_linear` says."""

    class Biased(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    Biased.__name__ = f"Biased{linear.__name__}"
    return Biased


def block_spec(
    config: TransformerConfig,
    backend: str,
    vp_stage: int | None = None,
    *,
    attention_output_bias: bool = False,
    mlp_bias: bool = False,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm, dense decoder layers throughout."""
    layer = _layer_spec(config, backend, attention_output_bias, mlp_bias)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    norm = _provider(backend).layer_norm(rms_norm=True, has_residual=False)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def _layer_spec(
    config: TransformerConfig, backend: str, attention_output_bias: bool, mlp_bias: bool
) -> ModuleSpec:
    """One dense decoder layer: pre-norm attention and gated MLP.

    Checkpoints of both backends are interchangeable: where norms stand alone, they are stored
    under the names of TransformerEngine's fused norm-and-linear layers.
    """
    provider = _provider(backend)
    fused = provider.column_parallel_layer_norm_linear()
    column = fused or provider.column_parallel_linear()
    row = provider.row_parallel_linear()
    norm = provider.layer_norm(rms_norm=True, has_residual=True)
    qk_norm = provider.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else IdentityOp
    mlp = get_mlp_module_spec_for_backend(provider)
    if mlp_bias:
        submodules = mlp.keywords["submodules"]
        submodules.linear_fc1 = _biased(submodules.linear_fc1)
        submodules.linear_fc2 = _biased(submodules.linear_fc2)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=provider.core_attention(),
                    linear_proj=_biased(row) if attention_output_bias else row,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused else norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={}
            if fused
            else {
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
