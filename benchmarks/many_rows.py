"""Memory of the process that trains on many short rows.

    python benchmarks/many_rows.py --tokenizer DIR --rows 10000000 [--processes 8] [--packing]

Writes the rows, reads, tokenises, shuffles and packs them as training does, and draws micro-batches
for 1,000 steps. Prints this process's resident memory over that of the imports: all of it, and
anonymous memory, pages of mapped files and shared memory apart.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

KINDS = ("RssAnon", "RssFile", "RssShmem")


def resident() -> list[float]:
    """MiB of this process's resident memory of each of `KINDS`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(status[kind].split()[0]) / 1024 for kind in KINDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with a template")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--packing", action="store_true")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from swiftmeg.data.collate import Collator
    from swiftmeg.data.encoded.encode import encode_rows
    from swiftmeg.data.encoded.packing import PackedDataset
    from swiftmeg.data.loader import BatchLoader
    from swiftmeg.data.sources.load import load_rows
    from swiftmeg.data.template.template import Template

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    template = Template(tokenizer, max_length=2048)
    imports = resident()
    with tempfile.TemporaryDirectory() as work:
        os.environ["SWIFTMEG_CACHE"] = f"{work}/cache"
        with Path(work, "rows.jsonl").open("w") as out:
            for number in range(args.rows):
                out.write(json.dumps({"query": f"{number}?", "response": "yes"}) + "\n")
        start = time.perf_counter()

        def say(what: str) -> None:
            passed = time.perf_counter() - start
            over = [now - before for now, before in zip(resident(), imports, strict=True)]
            kinds = ", ".join(f"{kind} {size:.0f}" for kind, size in zip(KINDS, over, strict=True))
            print(f"{what:10} {sum(over):6.0f} MiB ({kinds})  {passed:6.0f} s", flush=True)

        rows, _ = load_rows([f"{work}/rows.jsonl"], dataset_num_proc=args.processes)
        say("rows read")
        encoded = encode_rows(rows, template, num_proc=args.processes)
        say("tokenised")
        dataset = PackedDataset(encoded, 2048) if args.packing else encoded
        loader = BatchLoader(
            dataset,
            Collator(0),
            micro_batch_size=4,
            global_batch_size=16,
            dp_rank=0,
            dp_size=1,
        )
        for number, _ in enumerate(loader):
            if number % 1000 == 0:
                say(f"step {number // 4}")
            if number == 4000:
                break


if __name__ == "__main__":
    main()
