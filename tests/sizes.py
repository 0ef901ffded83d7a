"""The tiny models that many tests train: name -> family and sizes of tests.tiny."""

from typing import Any

Sizes = dict[str, Any]

GROUPED: Sizes = {"num_attention_heads": 4, "num_key_value_heads": 2}

BIASED: Sizes = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_size": 64,
    "attention_bias": True,
    "mlp_bias": True,
}
"""A llama with biases everywhere."""

MOE: Sizes = GROUPED | {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "router_aux_loss_coef": 0.0,
}
"""A qwen2_moe: softmax scores, a shared expert behind a gate, one dense layer."""

MLA: Sizes = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "q_lora_rank": 24,
    "kv_lora_rank": 18,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "num_mtp_layers": 0,
}
"""A deepseek_v3: latent attention with values narrower than keys, groups of experts, sigmoid scores
and a bias."""

YARN: Sizes = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}

ERNIE: Sizes = GROUPED | {
    "num_hidden_layers": 3,
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_intermediate_size": 20,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_interval": 1,
}
"""An ernie4_5_moe: softmax scores with a bias, routers in fp32 in every dtype."""

EXPERTS: dict[str, tuple[str, Sizes]] = {
    "qwen2_moe": (
        "qwen2_moe",
        MOE | {"num_hidden_layers": 3, "num_experts": 6, "moe_intermediate_size": 20},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        MLA | {"num_hidden_layers": 3, "rope_parameters": YARN},
    ),
}
"""Of three layers."""
