"""The matrix on GPUs, in bf16: `python -m tests.gpu.matrix`.

In bf16 layouts cannot agree to the last bit. So every row's distance from one run is stated beside
the distance of a second one-device run that adds up in another order, and of a run in float32.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from swiftmeg.models.layers import choose_backend
from tests.matrix.__main__ import KEYS, header, quiet, table_line
from tests.matrix.harness import compare, run
from tests.matrix.rows import Row, write_inputs

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
"""Head sizes that cuDNN's fused attention takes."""

ONE_DEVICE = [
    Row("dense", "", "padding_free", 2),
    Row("dense", "", "padded", 4),
    Row("dense", "", "packed", 1),
    Row("dense", "", "packed", 4),
    Row("dense", "recompute", "packed", 1),
]
TWO_DEVICES = [
    Row("dense", "dp2", "packed", 2),
    Row("dense", "tp2 sp", "packed", 2),
    Row("dense", "pp2", "padding_free", 2),
    Row("dense", "cp2", "packed", 2),
    Row("dense", "cp2", "padded", 4),
]
BF16 = {"torch_dtype": "bfloat16"}


def line(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    differences = compare(found, expected)
    table_line([name, *(f"{differences[key][0]:.1e}" for key in KEYS)])


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


def main() -> int:
    work = Path(tempfile.mkdtemp())
    one = Row("dense", "", "padding_free", 1)
    with quiet():
        write_inputs(work, {"dense"}, **SIZES)
        reference = run(work, one, "reference", **BF16)
    print(f"layers: {choose_backend(None)}, devices: {torch.cuda.device_count()}")
    header("run", *KEYS)
    devices = torch.cuda.device_count()
    rows = [*ONE_DEVICE, *(TWO_DEVICES if devices > 1 else [])]
    for name, row, extra in (
        ("float32", one, {"torch_dtype": "float32"}),
        ("another order of rows", one, BF16 | {"seed": 7}),
        ("native layers", one, BF16 | {"transformer_impl": "native"}),
        *((str(row), row, BF16) for row in rows),
    ):
        try:
            with quiet():
                found = run(work, row, name.replace(" ", "-").replace("|", ""), **extra)
            line(name, found, reference)
        except RuntimeError as error:
            print(f"FAILED {name}: {str(error)[-600:]}")
    failed = False
    for name, impl in (("TransformerEngine", None), ("native", "native")):
        extra = BF16 | {"deterministic_mode": "true", "hidden_dropout": 0.1}
        if impl:
            extra["transformer_impl"] = impl
        row = Row("dense", "", "packed", 2)
        try:
            with quiet():
                runs = [run(work, row, f"twice-{name}-{i}", **extra) for i in range(2)]
            same = is_same(*runs)
        except RuntimeError as error:
            print(f"FAILED deterministic {name}: {str(error)[-600:]}")
            same = False
        failed |= not same
        print(f"deterministic_mode twice, {name}: {'bit-identical' if same else 'NOT identical'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
