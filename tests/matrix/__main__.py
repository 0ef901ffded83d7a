"""Run the whole matrix, print it as a table and write it to docs/exactness.md.

`python -m tests.matrix [WORD ...]` runs the rows that hold every WORD, and writes nothing then.
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.matrix.cases import MODELS, ROWS, Row, write_inputs
from tests.matrix.harness import (
    BOUND,
    STEPS,
    check_trained,
    compare,
    faults_of,
    one_step,
    run,
)
from tests.matrix.harness import transformers_step as transformers
from tests.matrix.mutations import MUTATIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exactness.md"
KEYS = ("loss", "grad_norm", "gradients", "weights")

INTRODUCTION = f"""\
# Exactness

Written by `make matrix` (`python -m tests.matrix`): the same tiny models trained for {STEPS} steps
in float32 on CPU processes, in every layout and form of batch, and compared with one process.

A cell is the largest difference relative to what is compared: the loss and the gradient norm of
every step, every gradient of the first step (the norm of the tensor's difference over its norm) and
every weight after the last, under Hugging Face names. A row fails beyond {BOUND:.0e}, if the run
did not learn, if a tensor had no gradient, or if copies of a weight on different ranks are not
bit-identical. The run of one process is compared with transformers first.

Models called `-lora` train adapters, of routed experts and router too, and whole modules beside
them; `tests/matrix/cases.py` lists their flags. Their gradients are those of the second step
(before it A has none), their weights the adapters and the merged model, their reference is PEFT.

Layouts are written in words: `tp2 sp` is tensor parallelism over two ranks with sequence
parallelism, `pp` pipeline stages, `vpp` model parts a stage, `cp` context parallelism, `dp` data
parallelism, `ep` and `etp` expert and expert-tensor parallelism.
"""


@contextlib.contextmanager
def quiet() -> Any:
    """Send what ranks print to nowhere; failures come back as exceptions."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for target, source in enumerate(kept, 1):
            os.dup2(source, target)


def table_line(cells: list[str]) -> str:
    line = "| " + " | ".join(cells) + " |"
    print(line, flush=True)
    return line


def header(*cells: str) -> list[str]:
    return [table_line(list(cells)), table_line(["--"] * len(cells))]


class Matrix:
    """Runs, and what is wrong with them."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.references: dict[str, dict[str, Any]] = {}
        self.red: list[str] = []

    def reference(self, model: str) -> dict[str, Any]:
        if model not in self.references:
            with quiet():
                row = Row(model, "", "padding_free")
                self.references[model] = run(self.work, row, f"{model}-reference")
        return self.references[model]

    def against_transformers(self, model: str) -> str:
        found = self.reference(model)
        expected = transformers(self.work, model, found)
        differences = compare(one_step(found), expected)
        if check_trained(found) or max(v for v, _ in differences.values()) > BOUND:
            self.red.append(f"{model} against transformers")
        cells = [f"{differences[key][0]:.1e}" for key in KEYS[:3]]
        return table_line([model, *cells])

    def row(self, row: Row) -> str:
        start = time.monotonic()
        name = [row.model, row.layout or "one process", row.form, str(row.micro_batch_size)]
        try:
            expected = self.reference(row.model)
            with quiet():
                found = run(self.work, row)
            differences, faults = compare(found, expected), faults_of(found, expected)
            cells = [f"{differences[key][0]:.1e}" for key in KEYS]
        except RuntimeError as error:
            faults, cells = [str(error).splitlines()[-1]], ["-"] * len(KEYS)
        if faults:
            self.red.append(f"{row}: {'; '.join(faults)}")
        seconds = f"{time.monotonic() - start:.0f}"
        return table_line([*name, str(row.world), *cells, "RED" if faults else "ok", seconds])

    def mutation(self, each: Any) -> str:
        expected = self.reference(each.row.model)
        with quiet():
            faults = faults_of(run(self.work, each.row, mutate=each.apply), expected)
        if not faults:
            self.red.append(f"not seen: {each.words}")
        return table_line(
            [each.words, str(each.row).replace(" |", ","), faults[0] if faults else "NOT SEEN"]
        )


def main(words: list[str]) -> int:
    rows = [row for row in ROWS if all(word in str(row) for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder))
        with quiet():
            write_inputs(matrix.work, {row.model for row in rows})
        page = [INTRODUCTION, "## One process against transformers, one step", ""]
        page += header("model", *KEYS[:3])
        page += [matrix.against_transformers(m) for m in MODELS if (matrix.work / m).is_dir()]
        page += ["", "## Layouts against one process", ""]
        page += header("model", "layout", "form", "micro batch", "processes", *KEYS, "", "seconds")
        page += [matrix.row(row) for row in rows]
        if not words:
            page += ["", "## Known bugs, put back", ""]
            page += ["Each must turn its row red; the last column says what gave it away.", ""]
            page += header("bug", "row", "seen by")
            page += [matrix.mutation(each) for each in MUTATIONS]
    print(*(f"RED {line}" for line in matrix.red), sep="\n")
    if not words:
        PAGE.write_text("\n".join(page) + "\n")
    return 1 if matrix.red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
