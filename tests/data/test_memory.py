"""Memory of a process that prepares many short rows and trains on them."""

import json
import multiprocessing
from pathlib import Path

from swiftmeg.data.collate import Collator
from swiftmeg.data.encoded import encode
from swiftmeg.data.encoded.packing import PackedDataset
from swiftmeg.data.loader import BatchLoader
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.template.template import Template

ROWS = 60_000
BYTES_A_ROW = 160
"""Ten million rows then take 1.5 GiB. In memory or in touched pages, one of these rows takes more
than twice as much."""


def resident():
    """Bytes of this process's memory, mapped files included."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def prepare_and_draw(path, template, steps):
    """As training does; returns what must stay alive, and the memory after some steps and more."""
    rows, _ = load_rows([str(path)])
    encoded = encode.encode_rows(rows, template)
    loader = BatchLoader(
        PackedDataset(encoded, 256),
        Collator(0),
        micro_batch_size=2,
        global_batch_size=2,
        dp_rank=0,
        dp_size=1,
    )
    batches = iter(loader)
    for _ in range(10):
        next(batches)
    early = resident()
    for _ in range(steps):
        next(batches)
    return (rows, batches), early, resident()


def measure(folder, template, answers):
    encode._LARGE = 0  # as many rows as this small test cannot have
    prepare_and_draw(folder / "few.jsonl", template, 200)  # what is loaded on the way
    before = resident()
    kept, early, late = prepare_and_draw(folder / "many.jsonl", template, 2000)
    answers.put((early - before, late - early))
    del kept


def test_memory_grows_little_with_rows_and_not_with_steps(make_tokenizer, tmp_path):
    text = "the quick brown fox jumps over the lazy dog " * 4
    for name, count in (("few", 20_000), ("many", ROWS)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    template = Template(make_tokenizer(None), use_chat_template=False)
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    process = fork.Process(target=measure, args=(tmp_path, template, answers))
    process.start()
    rows, steps = answers.get(timeout=240)
    process.join()
    assert rows < BYTES_A_ROW * ROWS
    assert steps < 4 * 2**20
