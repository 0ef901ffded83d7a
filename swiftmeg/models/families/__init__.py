"""One file a family; importing this package registers them all."""

from swiftmeg.models.families import (  # noqa: F401
    deepseek_v2,
    deepseek_v3,
    llama,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
