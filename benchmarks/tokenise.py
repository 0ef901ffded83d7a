"""Tokenise conversations with swiftmeg and with `datasets.map`, side by side.

    python benchmarks/tokenise.py --tokenizer DIR [--rows 60000] [--processes 1 2]

`datasets.map` renders each conversation with the tokenizer's chat template and tokenises it, a
batch at a time, without a loss mask; swiftmeg also finds the mask. Both write memory-mapped files
and find no cache. Text is the standard library's documentation strings, two turns a row.
"""

import argparse
import ast
import itertools
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def texts() -> Iterator[str]:
    """Documentation strings, for ever."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    found = []
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found.append(ast.get_docstring(node) or "")
    return itertools.cycle([text for text in found if len(text) > 40])


def write_rows(path: Path, count: int) -> None:
    """Write `count` conversations of two turns."""
    source = texts()
    with path.open("w") as out:
        for number in range(count):
            messages = []
            for turn in range(2):
                messages.append(
                    {"role": "user", "content": f"{number}.{turn}: {next(source)[:200]}"}
                )
                messages.append({"role": "assistant", "content": next(source)})
            out.write(json.dumps({"messages": messages}) + "\n")


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of all processors together, that `work` takes."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - start, sum(os.times()[:4]) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with a template")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()

    from datasets import Dataset, disable_caching
    from transformers import AutoTokenizer

    from swiftmeg.data.encode import encode_rows
    from swiftmeg.data.sources import load_rows
    from swiftmeg.data.template import Template

    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory() as work:
        os.environ["SWIFTMEG_CACHE"] = f"{work}/cache"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the same number of processes, no threads
        write_rows(Path(work, "rows.jsonl"), args.rows)
        rows, _ = load_rows([f"{work}/rows.jsonl"], dataset_shuffle=False)
        plain = Dataset.from_file(rows.cache_files[0]["filename"])

        def by_map(batch: dict[str, list[list[dict[str, str]]]]) -> dict[str, list[list[int]]]:
            rendered = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            return {"input_ids": ids}

        for processes in args.processes:
            figures: dict[str, tuple[float, float]] = {}
            tokens = 0
            for run in range(2):
                mapped = {}

                def theirs(count: int = processes, mapped: dict[str, Dataset] = mapped) -> None:
                    mapped["rows"] = plain.map(
                        by_map,
                        batched=True,
                        num_proc=count if count > 1 else None,
                        remove_columns=plain.column_names,
                        cache_file_name=None,
                    )

                def ours(count: int = processes, run: int = run) -> None:
                    folder = f"{work}/{count}-{run}"
                    encode_rows(rows, Template(tokenizer), num_proc=count, cache_dir=folder)

                for name, call in (("swiftmeg", ours), ("datasets.map", theirs)):
                    figures[name] = min(seconds(call), figures.get(name, (float("inf"), 0.0)))
                tokens = sum(map(len, mapped["rows"]["input_ids"]))
            for name, (time_taken, processor) in figures.items():
                print(
                    f"{processes} process(es)  {name:12}  {time_taken:6.2f} s  "
                    f"{processor:6.2f} s of processors  "
                    f"{args.rows / time_taken:8.0f} rows/s  "
                    f"{tokens / time_taken / 1e6:5.2f} M tokens/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
