"""Tiny Hugging Face models with awkward sizes and every parameter randomised."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SIZES: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_next": Qwen3NextConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "deepseek_v3": DeepseekV3Config,
    "ernie4_5_moe": Ernie4_5_MoeConfig,
    "glm4": Glm4Config,
    "gpt_oss": GptOssConfig,
    "mistral": MistralConfig,
    "olmo2": Olmo2Config,
    "olmo3": Olmo3Config,
    "olmoe": OlmoeConfig,
}


def save_model(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **sizes: Any,
) -> Path:
    """Write a randomised model of `family` with its tokenizer; `sizes` override SIZES."""
    settings = SIZES | sizes
    if family in ("qwen2", "qwen2_moe", "deepseek_v3", "olmo2", "olmo3", "olmoe"):
        settings.pop("head_dim")
    config = CONFIGS[family](**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        biases = [(n, b) for n, b in model.named_buffers() if n.endswith("correction_bias")]
        for name, parameter in [*model.named_parameters(), *biases]:
            scale = 0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.normal_(0.0, scale)
            if "norm" in name:
                parameter.add_(1.0)
            if name.endswith("correction_bias"):
                parameter.mul_(0.2)  # every expert shall get tokens
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder, settings["vocab_size"])
    return folder


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer whose ids are below `vocab_size`."""
    specials = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    assert len(vocabulary) <= vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
