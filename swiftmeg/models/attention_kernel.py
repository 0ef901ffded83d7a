"""The table of attention kernels: which one runs in a model, and what it keeps in memory.

`models/layers.py` and `models/mla.py` take the module of a layer from it, `models/native` the
kernel of a call, `planning/` the bytes. The first kernel of `KERNELS` that applies is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from swiftmeg.models.kernels.varlen_attention import has_flash_attention_4


class AttentionConfig(Protocol):
    """What the choice reads of Megatron's namespace or of a TransformerConfig."""

    bf16: bool
    fp16: bool
    attention_dropout: float
    context_parallel_size: int
    kv_channels: int
    multi_latent_attention: bool
    softmax_type: str
    window_size: tuple[int, int] | None


@dataclass(frozen=True)
class Attention:
    """What one attention asks of a kernel."""

    backend: str
    """Layer backend: `transformer_engine` or `native`."""
    device: str
    """Type of the device that the tensors are on: `cuda` or `cpu`."""
    half: bool
    """Queries, keys and values are in bf16 or fp16."""
    packed: bool
    """Samples lie end to end (THD) instead of being padded to one length."""
    key_size: int
    """Channels of a query or key head."""
    value_size: int
    """Channels of a value head."""
    latent: bool = False
    """Multi-latent attention."""
    sinks: bool = False
    """Every head has one more logit in its softmax, of no token."""
    windows: bool = False
    """Some layers see a limited number of tokens."""
    context_parallel: bool = False
    dropout: bool = False

    @classmethod
    def of(
        cls, config: AttentionConfig, backend: str, device: str = "cuda", packed: bool = True
    ) -> "Attention":
        """The attention of a model that trains."""
        key_size = value_size = config.kv_channels
        if config.multi_latent_attention:
            key_size = config.qk_head_dim + config.qk_pos_emb_head_dim  # type: ignore[attr-defined]
            value_size = config.v_head_dim  # type: ignore[attr-defined]
        return cls(
            backend=backend,
            device=device,
            half=config.bf16 or config.fp16,
            packed=packed,
            key_size=key_size,
            value_size=value_size,
            latent=config.multi_latent_attention,
            sinks=config.softmax_type != "vanilla",
            windows=config.window_size is not None,
            context_parallel=config.context_parallel_size > 1,
            dropout=config.attention_dropout > 0,
        )


@dataclass(frozen=True)
class Extent:
    """The sizes that the bytes of a kernel depend on."""

    heads: float
    """Query heads on one tensor-parallel rank."""
    sequence: int
    """Tokens of the longest sample or pack."""
    rows: int
    """Samples of a micro-batch that share one mask."""
    element: int
    """Bytes of one value of a query."""


@dataclass(frozen=True)
class AttentionKernel:
    """One way to compute attention between the projections."""

    name: str
    applies: Callable[[Attention], bool]
    module: Callable[[], type]
    """Imports and returns the module of a layer."""
    bytes: Callable[[Attention, Extent], float]
    """Bytes per token kept for the backward pass beside queries, keys, values and the output."""


def _transformer_engine_applies(asked: Attention) -> bool:
    """Where its kernels do not depend on cuDNN's version, packing and context parallelism.

    They do with sinks, and with windows in sequences that ranks share. In multi-latent attention
    (TransformerEngine 2.20.2, cuDNN 9.14, H100) packed sequences got other losses, and gradients
    47% away from those of float32 and of padded batches, which agree (`tests/gpu/matrix.py`).
    """
    shared_windows = asked.windows and asked.context_parallel
    unsupported = asked.latent or asked.sinks or shared_windows
    return asked.backend == "transformer_engine" and not unsupported


def _flash_attention_4_applies(asked: Attention) -> bool:
    """Where it is installed, with head sizes that it is made for."""
    sizes = (asked.key_size, asked.value_size)
    fits = all(size % 8 == 0 and size <= 256 for size in sizes)
    plain = not asked.dropout and not asked.sinks
    asks = asked.packed and asked.device == "cuda" and asked.half
    return asks and plain and fits and has_flash_attention_4()


def _varlen_applies(asked: Attention) -> bool:
    """Where one launch can do all samples of a pack."""
    plain = not asked.dropout and not asked.sinks and asked.key_size == asked.value_size
    return asked.packed and asked.device == "cuda" and asked.half and plain


def _transformer_engine() -> type:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    module: type = TEDotProductAttention
    return module


def _native() -> type:
    from swiftmeg.models.native.attention import DotProductAttention

    return DotProductAttention


def _softmax_bytes(asked: Attention, extent: Extent) -> float:
    """One fp32 logarithm of a sum per head."""
    return 4 * extent.heads


def _masked_bytes(asked: Attention, extent: Extent) -> float:
    """That, and a mask over a token's keys, as booleans and in the dtype of the scores.

    The keys are at most a whole sequence. With sinks there are wider copies of queries, keys and
    values besides.
    """
    kept = _softmax_bytes(asked, extent)
    if asked.sinks or asked.windows or asked.context_parallel:
        kept += extent.sequence * (1 + extent.element) / extent.rows
    if asked.sinks:
        kept += extent.element * extent.heads * (3 * asked.key_size + 16)
    return kept


TRANSFORMER_ENGINE = AttentionKernel(
    "transformer_engine", _transformer_engine_applies, _transformer_engine, _softmax_bytes
)
FLASH_ATTENTION_4 = AttentionKernel(
    "flash_attention_4", _flash_attention_4_applies, _native, _softmax_bytes
)
VARLEN = AttentionKernel("varlen", _varlen_applies, _native, _softmax_bytes)
SDPA = AttentionKernel("sdpa", lambda asked: True, _native, _masked_bytes)

KERNELS = (TRANSFORMER_ENGINE, FLASH_ATTENTION_4, VARLEN, SDPA)
"""In the order of preference."""


def kernel_for(asked: Attention) -> AttentionKernel:
    """Return the first kernel that applies."""
    return next(kernel for kernel in KERNELS if kernel.applies(asked))
