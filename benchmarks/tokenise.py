"""Tokenise conversations with swiftmeg and with `datasets.map`, side by side.

    python benchmarks/tokenise.py --tokenizer DIR [--rows 60000] [--processes 1 2] [--runs 3]

`datasets.map` renders each conversation with the tokenizer's chat template and tokenises it, a
batch at a time, without a loss mask; swiftmeg also finds the mask. Both write their result to disk
and find no cache. Every run is a process of its own, the two take turns, and the first to run
changes; the best of all runs counts. Text is the standard library's documentation strings, two
turns a row.
"""

import argparse
import ast
import itertools
import json
import os
import subprocess
import sys
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


def measure(call: Callable[[], int]) -> dict[str, float]:
    """Seconds on the clock and of all processors together that `call` takes, and its tokens."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    tokens = call()
    passed, processor = time.perf_counter() - start, sum(os.times()[:4]) - before
    return {"seconds": passed, "processor": processor, "tokens": tokens}


def run(name: str, work: Path, tokenizer_folder: str, processes: int) -> dict[str, float]:
    """One run in this process; the imports and reading the rows are not counted."""
    from datasets import Dataset, disable_caching
    from transformers import AutoTokenizer

    from swiftmeg.data.encoded.encode import encode_rows
    from swiftmeg.data.sources.load import load_rows
    from swiftmeg.data.template.template import Template

    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows, _ = load_rows([str(work / "rows.jsonl")], dataset_shuffle=False)
    plain = Dataset.from_file(rows.cache_files[0]["filename"])

    def by_map(batch: dict[str, list[list[dict[str, str]]]]) -> dict[str, list[list[int]]]:
        rendered = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids}

    def theirs() -> Dataset:
        return plain.map(
            by_map,
            batched=True,
            num_proc=processes if processes > 1 else None,
            remove_columns=plain.column_names,
        )

    mapped: list[Dataset] = []
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if name == "swiftmeg":
            return measure(
                lambda: int(
                    encode_rows(rows, Template(tokenizer), num_proc=processes, cache_dir=folder)
                    .lengths()
                    .sum()
                )
            )
        found = measure(lambda: mapped.append(theirs()) or 0)
        return found | {"tokens": sum(map(len, mapped[0]["input_ids"]))}


NAMES = ("swiftmeg", "datasets.map")


def compare(args: argparse.Namespace, work: Path, processes: int) -> None:
    """Print the best run of both, and how many times as fast as the other swiftmeg is."""
    best: dict[str, dict[str, float]] = {}
    for number in range(args.runs):
        for name in NAMES if number % 2 else NAMES[::-1]:
            command = [sys.executable, __file__, "--tokenizer", args.tokenizer]
            command += ["--one", name, "--work", str(work), "--processes", str(processes)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(out.splitlines()[-1])
            best[name] = min(found, best.get(name, found), key=lambda each: each["seconds"])
    assert best[NAMES[0]]["tokens"] == best[NAMES[1]]["tokens"]
    for name, found in best.items():
        print(
            f"{processes} process(es)  {name:12}  {found['seconds']:6.2f} s  "
            f"{found['processor']:6.2f} s of processors  "
            f"{args.rows / found['seconds']:8.0f} rows/s  "
            f"{found['tokens'] / found['seconds'] / 1e6:5.2f} M tokens/s"
        )
    ratio = best["datasets.map"]["seconds"] / best["swiftmeg"]["seconds"]
    print(f"{processes} process(es)  swiftmeg is {ratio:.2f} times as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with a template")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3, help="runs of each")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the same number of processes, no threads
    if args.one:
        found = run(args.one, args.work, args.tokenizer, args.processes[0])
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as work:
        os.environ["SWIFTMEG_CACHE"] = f"{work}/cache"
        write_rows(Path(work, "rows.jsonl"), args.rows)
        for processes in args.processes:
            compare(args, Path(work), processes)


if __name__ == "__main__":
    main()
