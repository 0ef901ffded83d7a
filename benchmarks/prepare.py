"""Make what the speed runs need and no download gives: a model of a known shape and real text.

    python benchmarks/prepare.py --shape qwen2.5-1.5b --tokenizer DIR --output bench

writes bench/qwen2.5-1.5b (random weights in bf16, DIR's tokenizer) and bench/stdlib.jsonl (the
sources of Python's standard library, one file a row).
"""

import argparse
import json
import sysconfig
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    LlamaConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

SHAPES = {
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "llama3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    # four layers of Qwen1.5-MoE-A2.7B
    "qwen1.5-moe-a2.7b-4l": Qwen2MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    # DeepSeek-V3's layers in small: latent attention, sigmoid router with bias, a shared expert
    "deepseek-v3-small": DeepseekV3Config(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        moe_intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_mtp_layers=0,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def write_model(shape: str, tokenizer: str, folder: Path) -> None:
    """Write random bf16 weights of `shape`, created on the GPU if there is one."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def write_text(file: Path) -> None:
    """Write the standard library's sources, one `text` row a file, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    with file.open("w") as out:
        for source in sorted(root.rglob("*.py")):
            if not {"test", "tests", "site-packages", "idlelib"} & set(source.parts):
                text = source.read_text(encoding="utf-8", errors="replace")
                if text.strip():
                    out.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--tokenizer", required=True, help="folder of any tokenizer")
    parser.add_argument("--output", type=Path, default=Path("bench"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    write_model(args.shape, args.tokenizer, args.output / args.shape)
    write_text(args.output / "stdlib.jsonl")


if __name__ == "__main__":
    main()
