"""One file a family; importing this package registers them all."""

from swiftmeg.models.families import (  # noqa: F401
    deepseek,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    glm4_moe,
    internlm3,
    llama,
    mimo,
    mistral,
    mixtral,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
