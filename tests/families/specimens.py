"""The tiny models that stand for the families.

Sizes are awkward on purpose: few divide each other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models import auto
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from swiftmeg.models import families  # noqa: F401  (registers them)
from swiftmeg.models.family import REGISTRY

SIZES: dict[str, Any] = {
    "vocab_size": 163,
    "hidden_size": 40,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 12}
EXPERTS = {"moe_intermediate_size": 20, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 11,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}


@dataclass(frozen=True)
class Specimen:
    """A tiny model: transformers' config class and sizes, and what makes it special."""

    config_class: str
    sizes: dict[str, Any]
    published: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """config.json as the family publishes it, from what transformers writes."""
    build: Callable[[Any], torch.nn.Module] | None = None
    """The oracle, where transformers has no class for it."""
    experts: bool = False

    def config(self) -> Any:
        """The transformers config."""
        return getattr(transformers, self.config_class)(**(SIZES | self.sizes))


def _named(architecture: str, model_type: str, **keys: Any) -> Callable[..., dict[str, Any]]:
    """A config.json under another name, with `keys` in place of those that are None."""

    def publish(config: dict[str, Any]) -> dict[str, Any]:
        changed = {k: v for k, v in config.items() if k not in keys or keys[k] is not None}
        kept = {k: v for k, v in keys.items() if v is not None}
        return changed | kept | {"architectures": [architecture], "model_type": model_type}

    return publish


def _deepseek(config: Any) -> torch.nn.Module:
    """DeepSeek-MoE: Llama's attention around DeepSeek-V2's experts, whose maths is the same."""
    model = transformers.LlamaForCausalLM(config)
    kept = {"hidden_size", *_DEEPSEEK}
    sizes = {key: value for key, value in config.to_dict().items() if key in kept}
    for layer in model.model.layers[config.first_k_dense_replace :]:
        layer.mlp = DeepseekV2Moe(transformers.DeepseekV2Config(**(SIZES | LATENT | sizes)))
    return model


_DEEPSEEK = {
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}

_V3 = LATENT | {
    "q_lora_rank": 18,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "num_nextn_predict_layers": 0,
}

_NEXT = (
    HEADS
    | EXPERTS
    | {
        "num_experts": 6,
        "shared_expert_intermediate_size": 28,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 12,
        "linear_key_head_dim": 14,
        "linear_value_head_dim": 10,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 4,
        "rms_norm_eps": 1e-2,  # else outputs near 0 become large ones with their rounding
    }
)

SPECIMENS: dict[str, dict[str, Specimen]] = {
    "LlamaForCausalLM": {
        "llama": Specimen("LlamaConfig", HEADS | {"attention_bias": True, "mlp_bias": True}),
    },
    "MistralForCausalLM": {
        "mistral": Specimen("MistralConfig", HEADS | {"sliding_window": 9}),
    },
    "InternLM3ForCausalLM": {
        "internlm3": Specimen(
            "LlamaConfig",
            HEADS
            | {
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 900.0, "factor": 6.0},
                "max_position_embeddings": 32,
            },
            published=_named(
                "InternLM3ForCausalLM",
                "internlm3",
                attention_bias=None,
                mlp_bias=None,
                qkv_bias=True,
                bias=True,
                auto_map={"AutoConfig": "configuration_internlm3.InternLM3Config"},
            ),
        ),
    },
    "Qwen2ForCausalLM": {"qwen2": Specimen("Qwen2Config", {"tie_word_embeddings": True})},
    "MiMoForCausalLM": {
        "mimo": Specimen(
            "Qwen2Config",
            {},
            published=_named("MiMoForCausalLM", "mimo", num_nextn_predict_layers=0),
        ),
    },
    "Qwen3ForCausalLM": {"qwen3": Specimen("Qwen3Config", HEADS)},
    "Ernie4_5ForCausalLM": {
        "ernie4_5": Specimen("Ernie4_5Config", HEADS | {"use_bias": True}),
    },
    "Ernie4_5_ForCausalLM": {
        "ernie4_5-older": Specimen(
            "Ernie4_5Config", HEADS, published=_named("Ernie4_5_ForCausalLM", "ernie4_5")
        ),
    },
    "Qwen2MoeForCausalLM": {
        "qwen2_moe": Specimen(
            "Qwen2MoeConfig",
            EXPERTS | {"num_experts": 6, "shared_expert_intermediate_size": 28},
            experts=True,
        ),
        "qwen2_moe-normed": Specimen(
            "Qwen2MoeConfig",
            EXPERTS
            | {
                "num_experts": 6,
                "shared_expert_intermediate_size": 28,
                "norm_topk_prob": True,
                "decoder_sparse_step": 2,
            },
            experts=True,
        ),
    },
    "Qwen3MoeForCausalLM": {
        "qwen3_moe": Specimen(
            "Qwen3MoeConfig",
            HEADS | EXPERTS | {"num_experts": 6, "norm_topk_prob": True, "mlp_only_layers": [2]},
            experts=True,
        ),
    },
    "Qwen3NextForCausalLM": {
        "qwen3_next": Specimen("Qwen3NextConfig", _NEXT, experts=True),
        "qwen3_next-dense": Specimen(
            "Qwen3NextConfig",
            _NEXT
            | {
                "layer_types": ["full_attention", "linear_attention"] * 2,
                "num_key_value_heads": 1,
                "linear_num_value_heads": 4,
                "linear_conv_kernel_dim": 3,
                "mlp_only_layers": [0, 3],
                "norm_topk_prob": False,
            },
            experts=True,
        ),
    },
    "MixtralForCausalLM": {
        "mixtral": Specimen(
            "MixtralConfig",
            HEADS | {"num_local_experts": 6, "num_experts_per_tok": 2},
            experts=True,
        ),
    },
    "DeepseekForCausalLM": {
        "deepseek": Specimen(
            "LlamaConfig",
            _DEEPSEEK | {"first_k_dense_replace": 1},
            published=_named("DeepseekForCausalLM", "deepseek", scoring_func="softmax"),
            build=_deepseek,
            experts=True,
        ),
    },
    "DeepseekV2ForCausalLM": {
        "deepseek_v2-lite": Specimen(
            "DeepseekV2Config",
            LATENT
            | EXPERTS
            | {
                "q_lora_rank": None,
                "n_routed_experts": 6,
                "n_shared_experts": 2,
                "first_k_dense_replace": 1,
                "rope_parameters": YARN,
            },
            experts=True,
        ),
        "deepseek_v2": Specimen(
            "DeepseekV2Config",
            LATENT
            | EXPERTS
            | {
                "q_lora_rank": 18,
                "n_routed_experts": 6,
                "n_shared_experts": 1,
                "topk_method": "group_limited_greedy",
                "n_group": 3,
                "topk_group": 2,
                "num_experts_per_tok": 4,
                "routed_scaling_factor": 2.5,
            },
            experts=True,
        ),
    },
    "DeepseekV3ForCausalLM": {
        "deepseek_v3": Specimen("DeepseekV3Config", _V3 | {"rope_parameters": YARN}, experts=True),
        "kimi_k2": Specimen(
            "DeepseekV3Config",
            _V3 | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
            published=_named(
                "DeepseekV3ForCausalLM",
                "kimi_k2",
                auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
            ),
            experts=True,
        ),
    },
    "Dots1ForCausalLM": {
        "dots1": Specimen(
            "Dots1Config",
            HEADS
            | EXPERTS
            | {
                "num_key_value_heads": 4,
                "n_routed_experts": 6,
                "n_shared_experts": 2,
                "n_group": 2,
                "topk_group": 1,
                "num_experts_per_tok": 3,
                "first_k_dense_replace": 1,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "attention_bias": True,
            },
            experts=True,
        ),
    },
    "Ernie4_5_MoeForCausalLM": {
        "ernie4_5_moe": Specimen(
            "Ernie4_5_MoeConfig",
            {
                "moe_intermediate_size": 20,
                "moe_num_experts": 6,
                "moe_k": 2,
                "moe_num_shared_experts": 2,
                "moe_layer_start_index": 1,
                "moe_layer_interval": 1,
            },
            experts=True,
        ),
    },
    "Glm4MoeForCausalLM": {
        "glm4_moe": Specimen(
            "Glm4MoeConfig",
            HEADS
            | EXPERTS
            | {
                "n_routed_experts": 6,
                "n_shared_experts": 1,
                "n_group": 3,
                "topk_group": 2,
                "first_k_dense_replace": 1,
                "routed_scaling_factor": 2.5,
                "attention_bias": True,
                "use_qk_norm": True,
                "num_nextn_predict_layers": 0,
            },
            experts=True,
        ),
    },
    "GlmForCausalLM": {
        "glm": Specimen("GlmConfig", {"head_dim": 12, "pad_token_id": 0}),
    },
    "Glm4ForCausalLM": {
        "glm4": Specimen("Glm4Config", {"head_dim": 12, "pad_token_id": 0}),
    },
    "Glm4MoeLiteForCausalLM": {
        "glm4_moe_lite": Specimen(
            "Glm4MoeLiteConfig",
            {k: v for k, v in _V3.items() if k != "first_k_dense_replace"}
            | {
                "topk_group": 3,
                "n_routed_experts": 8,
                "n_group": 4,
                "num_experts_per_tok": 5,
                "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
                "rms_norm_eps": 1e-2,  # not that of the latent norms
            },
            experts=True,
        ),
    },
    "Olmo2ForCausalLM": {"olmo2": Specimen("Olmo2Config", {"attention_bias": True})},
    "Olmo3ForCausalLM": {
        "olmo3": Specimen(
            "Olmo3Config",
            {
                "sliding_window": 7,
                "rope_theta": 900.0,
                "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}
                | {"attention_factor": 1.2},
            },
        ),
        "olmo3-windows": Specimen(
            "Olmo3Config",
            {"num_hidden_layers": 2, "sliding_window": 9, "num_key_value_heads": 1},
        ),
    },
    "OlmoeForCausalLM": {
        "olmoe": Specimen("OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 2}, experts=True)
    },
    "GptOssForCausalLM": {
        "gpt_oss": Specimen(
            "GptOssConfig",
            HEADS
            | {
                "num_local_experts": 6,
                "num_experts_per_tok": 2,
                "sliding_window": 7,
                "swiglu_limit": 0.6,
                "rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}
                | {"truncate": False},
            },
            experts=True,
        ),
    },
    "MiniMaxM2ForCausalLM": {
        "minimax_m2": Specimen(
            "MiniMaxM2Config",
            HEADS | {"num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 6},
            experts=True,
        ),
    },
}
"""Architecture -> its specimens by name."""


def default_specimen(architecture: str) -> Specimen:
    """A dense model of transformers' class for `architecture`."""
    causal = auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    (kind,) = (kind for kind, name in causal.items() if name == architecture)
    return Specimen(type(transformers.AutoConfig.for_model(kind)).__name__, HEADS)


def _specimens() -> dict[str, Specimen]:
    """Specimens by name: those above, and a dense one of every other family of the registry."""
    named = {name: made for group in SPECIMENS.values() for name, made in group.items()}
    others = REGISTRY.families.keys() - SPECIMENS.keys()
    return named | {name: default_specimen(name) for name in sorted(others)}


ALL = _specimens()

ARCHITECTURES = {name: arch for arch, group in SPECIMENS.items() for name in group}
"""Specimen -> architecture, where their names differ."""


def label(name: str) -> str:
    """The name of a specimen's cases, which `pytest -k ARCHITECTURE` finds."""
    return f"{ARCHITECTURES[name]}/{name}" if name in ARCHITECTURES else name
