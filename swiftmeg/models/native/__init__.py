"""The native layer backend: torch-only modules where TransformerEngine is missing.

It fills what Megatron's own local modules lack: norms under sequence parallelism, attention over
grouped queries and packed (THD) sequences, grouped experts, and projections that every
tensor-parallel rank holds whole.
"""

from swiftmeg.models.native.provider import NativeSpecProvider

__all__ = ["NativeSpecProvider"]
