"""The matrix on GPUs, in bf16: `python -m tests.gpu.matrix` writes docs/exactness-gpu.md.

In bf16 layouts cannot agree to the last bit. So every row's distance from one run is stated beside
the distance of one-device runs that add up in another order, and of a run in float32.
"""

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from swiftmeg.models.layers import choose_backend
from tests.matrix.__main__ import header, quiet, table_line
from tests.matrix.cases import Row, write_inputs
from tests.matrix.harness import run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exactness-gpu.md"

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
"""Head sizes that cuDNN's fused attention takes."""

MODELS = {
    "dense": SIZES,
    "moe": SIZES | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "mla": LATENT | {"moe_intermediate_size": 64},
}
ONE_DEVICE = [
    ("padding_free", 2),
    ("padded", 4),
    ("packed", 1),
    ("packed", 4),
    ("recompute packed", 1),
]
TWO_DEVICES = {
    "dense": ["dp2", "tp2 sp", "pp2", "cp2"],
    "moe": ["ep2 dp2", "tp2 sp", "tp2 sp ep2 etp1"],
    "mla": ["ep2 dp2", "tp2 sp", "cp2"],
}
BF16 = {"torch_dtype": "bfloat16"}
AT_ONCE = 14
"""Runs beside each other: most of a run's time is imports."""

INTRODUCTION = """\
# Exactness on GPUs

Written by `python -m tests.gpu.matrix`: models of the matrix (`docs/exactness.md`), with head sizes
that fused kernels take, trained for two steps in bfloat16 and compared with one run of one device
(padding-free, one sample a micro-batch, the layers of the first column).

Rounding to bfloat16 is not the same in any two orders of addition, so nothing here is a bound: the
rows of one device (other micro-batches, other forms of batches, recomputation, the other layers)
say what a different order alone does, `float32` how far bfloat16 is from the truth. A layout that
stood out from them would be wrong. Gradients and weights: the norm of the difference of all tensors
over the norm of all tensors; `worst` is the tensor whose gradient differs most by its own norm.

Every family, with head sizes of fused kernels, is compared with float32 by
`tests/gpu/test_families.py`: on one H100 and one H200 the first step's gradients of packed rows in
bfloat16 were 0.8% to 14% away (Mixtral's, 13% on CPUs too), the losses at most 0.4%, with
TransformerEngine and with native layers alike. OLMo 3 and Seed-OSS are newer than those runs.
"""


def norm(tensors: Any) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def cells(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Differences of losses, gradient norms, gradients and weights, and the worst gradient."""
    result = []
    for key in ("lm loss", "grad_norm"):
        pairs = zip(found["lines"], expected["lines"], strict=True)
        result.append(f"{max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs):.1e}")
    for kind in ("gradients", "weights"):
        ours, theirs = found[kind], expected[kind]
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        gap = norm([ours[name].double() - theirs[name].double() for name in theirs])
        result.append(f"{gap / norm(theirs.values()):.1e}")
    ours, theirs = found["gradients"], expected["gradients"]
    gaps = {k: norm([ours[k] - theirs[k]]) / max(norm([theirs[k]]), 1e-9) for k in theirs}
    worst = max(gaps, key=lambda name: gaps[name])
    return [*result, f"{gaps[worst]:.1e} {worst.removesuffix('.weight')}"]


def is_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two runs agree in every bit of losses, norms, gradients and weights."""
    keys = ("lm loss", "grad_norm")
    lines = [[{k: each[k] for k in keys} for each in r["lines"]] for r in (first, second)]
    tensors = all(
        torch.equal(first[kind][name], second[kind][name])
        for kind in ("gradients", "weights")
        for name in first[kind]
    )
    return lines[0] == lines[1] and tensors


def runs_of(model: str, backend: str, devices: int) -> list[tuple[str, Row, dict[str, Any]]]:
    """Name, row and flags of every run; the first is what the others are compared with."""
    other = "native" if backend == "transformer_engine" else "transformer_engine"
    one = Row(model, "", "padding_free", 1)
    wanted = [
        (backend, one, {}),
        ("float32", one, {"torch_dtype": "float32"}),
        ("float32, native", one, {"torch_dtype": "float32", "transformer_impl": "native"}),
    ]
    if other == "native":
        wanted.append((other, one, {"transformer_impl": other}))
        wanted.append(
            (f"{other}, padded", Row(model, "", "padded", 4), {"transformer_impl": other})
        )
    for words, size in ONE_DEVICE:
        layout, _, form = words.rpartition(" ")
        wanted.append(("one device", Row(model, layout, form, size), {}))
    if devices > 1:
        wanted += [("", Row(model, layout, "packed", 2), {}) for layout in TWO_DEVICES[model]]
    return [(name or row.layout, row, BF16 | extra) for name, row, extra in wanted]


def twice(model: str) -> list[tuple[str, Row, dict[str, Any]]]:
    """Two runs of each backend that must agree in every bit."""
    backends = dict.fromkeys([choose_backend(None), "native"])
    row = Row(model, "", "packed", 2)
    flags = BF16 | {"deterministic_mode": "true", "hidden_dropout": 0.1}
    return [(b, row, flags | {"transformer_impl": b}) for b in backends for _ in range(2)]


def main(models: list[str]) -> int:
    models = models or list(MODELS)
    backend, devices = choose_backend(None), torch.cuda.device_count()
    failed = False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        work = Path(folder)

        def start(number: int, job: tuple[str, Row, dict[str, Any]]) -> Any:
            return pool.submit(run, work, job[1], f"run-{job[1].model}-{number}", **job[2])

        with quiet():
            for model in models:
                write_inputs(work, {model}, **MODELS[model])
            jobs = {m: [*runs_of(m, backend, devices), *twice(m)] for m in models}
            started = {m: [start(i, job) for i, job in enumerate(jobs[m])] for m in models}
            for future in [each for futures in started.values() for each in futures]:
                future.exception()
        page = [INTRODUCTION]
        print(f"{torch.cuda.get_device_name()}, {devices} devices, {backend}")
        for model in models:
            page += [f"## {model}", ""]
            page += header("run", "form", "lm loss", "grad_norm", "gradients", "weights", "worst")
            count = len(jobs[model]) - len(twice(model))
            expected = started[model][0].result()
            for (name, row, _), future in zip(
                jobs[model][1:count], started[model][1:], strict=False
            ):
                form = f"{row.layout} {row.form}, {row.micro_batch_size}".strip()
                if future.exception():
                    failed = True
                    print(f"FAILED {name} {form}: {str(future.exception())[-900:]}")
                    continue
                page.append(table_line([name, form, *cells(future.result(), expected)]))
            page.append("")
            pairs = started[model][count:]
            for (name, _, _), one, two in zip(
                jobs[model][count::2], pairs[::2], pairs[1::2], strict=True
            ):
                error = one.exception() or two.exception()
                same = error is None and is_same(one.result(), two.result())
                failed |= not same
                words = "bit-identical" if same else "failed" if error else "NOT identical"
                page.append(f"`--deterministic_mode true` twice, {name}: {words}.")
                print(page[-1], str(error or "")[-900:])
            page.append("")
    PAGE.write_text("\n".join(page).rstrip() + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
