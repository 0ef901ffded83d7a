"""config.json files of models whose weights no test needs."""

from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig

ROPE = {"rope_type": "default", "rope_theta": 1e6}

TINY: dict[str, Any] = {
    "qwen3": Qwen3Config(
        architectures=["Qwen3ForCausalLM"], vocab_size=1003, hidden_size=48, head_dim=16,
        intermediate_size=84, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        tie_word_embeddings=True, max_position_embeddings=512,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], vocab_size=1003, hidden_size=48, head_dim=16,
        intermediate_size=84, moe_intermediate_size=40, num_hidden_layers=4, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=6, num_key_value_heads=2, norm_topk_prob=True,
        mlp_only_layers=[0], max_position_embeddings=512,
    ),
    "deepseek_v3": DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"], vocab_size=1003, hidden_size=64,
        intermediate_size=96, moe_intermediate_size=40, num_hidden_layers=4, n_routed_experts=8,
        num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=1,
        first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24,
        kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        num_nextn_predict_layers=0, max_position_embeddings=512,
    ),
}  # fmt: skip

PUBLISHED: dict[str, Any] = {
    "Qwen2.5-1.5B": Qwen2Config(
        architectures=["Qwen2ForCausalLM"], dtype="bfloat16", vocab_size=151936, hidden_size=1536,
        intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=131072, tie_word_embeddings=True,
        rope_parameters=ROPE,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16", vocab_size=151936,
        hidden_size=4096, head_dim=128, intermediate_size=12288, moe_intermediate_size=1536,
        num_hidden_layers=94, num_experts=128, num_experts_per_tok=8, num_attention_heads=64,
        num_key_value_heads=4, norm_topk_prob=True, max_position_embeddings=40960,
        tie_word_embeddings=False, rope_parameters=ROPE,
    ),
    "DeepSeek-V3": DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16", vocab_size=129280,
        hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_hidden_layers=61, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4,
        n_shared_experts=1, first_k_dense_replace=3, routed_scaling_factor=2.5,
        num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512,
        qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, num_nextn_predict_layers=0,
        max_position_embeddings=163840,
    ),
}  # fmt: skip


def save_config(folder: Path, config: Any) -> Path:
    """Write a folder that holds config.json alone."""
    config.save_pretrained(folder)
    return folder
