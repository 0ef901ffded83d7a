"""Which attention kernel runs where, and that layers and the memory plan ask the same table."""

from types import SimpleNamespace
from typing import Any

import pytest

from swiftmeg.models.attention_kernel import KERNELS, Attention, Extent, kernel_for

PLAIN: dict[str, Any] = {
    "bf16": True,
    "fp16": False,
    "attention_dropout": 0.0,
    "context_parallel_size": 1,
    "kv_channels": 64,
    "multi_latent_attention": False,
    "softmax_type": "vanilla",
    "window_size": None,
}
LATENT = {"qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
LATENT["multi_latent_attention"] = True
SINKS = {"softmax_type": "learnable"}
WINDOWS = {"window_size": (127, 0)}
SHARED = {"context_parallel_size": 2}

TE, NATIVE = "transformer_engine", "native"


def asked(changes: dict[str, Any], backend: str = TE, **place: Any) -> Attention:
    return Attention.of(SimpleNamespace(**PLAIN | changes), backend, **place)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "backend", "place", "expected"),
    [
        ({}, TE, {}, "transformer_engine"),
        ({}, TE, {"packed": False}, "transformer_engine"),
        (WINDOWS, TE, {}, "transformer_engine"),
        (SHARED, TE, {}, "transformer_engine"),
        (WINDOWS | SHARED, TE, {}, "varlen"),
        (WINDOWS | SHARED, TE, {"packed": False}, "sdpa"),
        (SINKS, TE, {}, "sdpa"),
        (LATENT, TE, {}, "sdpa"),
        (LATENT | {"qk_head_dim": 64}, TE, {}, "varlen"),
        ({}, NATIVE, {}, "varlen"),
        ({}, NATIVE, {"device": "cpu"}, "sdpa"),
        ({}, NATIVE, {"packed": False}, "sdpa"),
        ({"bf16": False}, NATIVE, {}, "sdpa"),
        ({"bf16": False, "fp16": True}, NATIVE, {}, "varlen"),
        ({"attention_dropout": 0.1}, NATIVE, {}, "sdpa"),
        ({"attention_dropout": 0.1}, TE, {}, "transformer_engine"),
    ],
)
def test_the_first_that_applies_runs(
    changes: dict[str, Any], backend: str, place: dict[str, Any], expected: str
) -> None:
    assert kernel_for(asked(changes, backend, **place)).name == expected


def test_only_masks_and_sinks_take_memory_beside_the_tensors() -> None:
    extent = Extent(heads=4, sequence=1000, rows=2, element=2)

    def kept(changes: dict[str, Any], **place: Any) -> float:
        question = asked(changes, NATIVE, **place)
        return kernel_for(question).bytes(question, extent)

    assert kept({}) == kept({}, packed=False) == kept(WINDOWS) == 4 * 4
    mask = 1000 * 3 / 2
    assert kept(WINDOWS, packed=False) == kept(SHARED, packed=False) == 16 + mask
    assert kept(SINKS) == 16 + mask + 2 * 4 * (3 * 64 + 16)


def test_native_modules_are_there_without_a_gpu() -> None:
    modules = {kernel.name: kernel.module for kernel in KERNELS}
    assert modules["varlen"]() is modules["sdpa"]()
