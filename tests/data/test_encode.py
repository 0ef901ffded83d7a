"""Encoded rows on disk: content, account of drops, and sharing among processes."""

import logging
import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import psutil
import pytest
from datasets import Dataset

from swiftmeg.cache import get_or_build
from swiftmeg.data.encoded.encode import encode_rows, rows_fingerprint
from swiftmeg.data.parallel import map_chunks
from swiftmeg.data.template.template import Template
from swiftmeg.errors import UserError

fork = multiprocessing.get_context("fork")


def standard(question, answer, **columns):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def rows_of(count):
    return Dataset.from_list([standard(f"q {index}", f"fox {index}") for index in range(count)])


@pytest.fixture
def template(make_tokenizer, templates):
    return Template(make_tokenizer(templates.chatml))


def plain(row):
    """An item of an encoded set without arrays."""
    return {
        "input_ids": row["input_ids"].tolist(),
        "labels": row["labels"].tolist(),
        "length": row["length"],
    }


@pytest.mark.parametrize("num_proc", [1, 3])
def test_rows_are_encoded_in_order(template, num_proc):
    rows = rows_of(1203)  # three chunks
    encoded = encode_rows(rows, template, num_proc=num_proc)
    assert len(encoded) == 1203
    for index in (0, 499, 500, 1202):
        expected = template.encode(rows[index])
        assert plain(encoded[index]) == {**expected, "length": len(expected["input_ids"])}
    assert encoded.lengths().tolist() == [len(row["input_ids"]) for row in encoded]
    assert encoded.trained().tolist() == [
        sum(label != -100 for label in row["labels"]) for row in encoded
    ]
    again = pickle.loads(pickle.dumps(encoded))
    assert [plain(row) for row in again] == [plain(row) for row in encoded]


class Counting(Template):
    """Writes a line to `log` for each row that it encodes."""

    log: str

    def encode_many(self, rows):
        with open(self.log, "a") as file:
            file.write("row\n" * len(rows))
        return super().encode_many(rows)


@pytest.fixture
def counting(make_tokenizer, templates, tmp_path):
    template = Counting(make_tokenizer(templates.chatml))
    template.log = str(tmp_path / "log")
    template.count = lambda: len((tmp_path / "log").read_text().splitlines())
    return template


def test_the_second_time_nothing_is_encoded(counting, tmp_path):
    first = encode_rows(rows_of(5), counting, cache_dir=str(tmp_path / "own"))
    second = encode_rows(rows_of(5), counting, cache_dir=str(tmp_path / "own"))
    assert counting.count() == 5
    assert [plain(row) for row in first] == [plain(row) for row in second]
    encode_rows(rows_of(5), counting)  # another folder
    assert counting.count() == 10


def test_what_matters_is_part_of_the_key(make_tokenizer, templates, counting):
    rows = rows_of(3)
    encode_rows(rows, counting)
    changed = [
        (rows_of(4), make_tokenizer(templates.chatml), {}),
        (rows, make_tokenizer(templates.headers), {}),
        (rows, make_tokenizer(templates.chatml, kind="metaspace"), {}),
        (rows, make_tokenizer(templates.chatml), {"system": "Be brief."}),
        (rows, make_tokenizer(templates.chatml), {"max_length": 4000}),
        (rows, make_tokenizer(templates.chatml), {"loss_scale": "all"}),
        (rows, make_tokenizer(templates.chatml), {"truncation_strategy": "left"}),
    ]
    for number, (other_rows, tokenizer, options) in enumerate(changed, 1):
        other = Counting(tokenizer, **options)
        other.log = counting.log
        before = counting.count()
        encode_rows(other_rows, other)
        assert counting.count() == before + len(other_rows), f"change {number} was not noticed"
    same = Counting(make_tokenizer(templates.chatml))
    same.log = counting.log
    before = counting.count()
    encode_rows(rows_of(3), same)
    assert counting.count() == before


def test_plain_text_rows_depend_on_bos(make_tokenizer):
    rows = rows_of(1)
    with_bos = encode_rows(rows, Template(make_tokenizer(None), use_chat_template=False))
    tokenizer = make_tokenizer(None, bos_token=None)
    without = encode_rows(rows, Template(tokenizer, use_chat_template=False))
    assert with_bos[0]["length"] == without[0]["length"] + 1


def test_fingerprint_is_of_the_content():
    rows = rows_of(2500)
    assert rows_fingerprint(rows) == rows_fingerprint(rows_of(2500))
    assert rows_fingerprint(rows) == rows_fingerprint(rows.add_column("origin", ["x"] * 2500))
    assert rows_fingerprint(rows) != rows_fingerprint(rows.shuffle(seed=1))
    assert rows_fingerprint(rows) == rows_fingerprint(rows.select([*range(2500)]))


def test_dropped_rows_are_counted(make_tokenizer, templates, caplog):
    caplog.set_level(logging.INFO)
    rows = Dataset.from_list(
        [
            standard("a", "b", origin="f.jsonl:1"),
            standard("a", "word " * 50, origin="f.jsonl:2"),
            standard("a", "word " * 60, origin="f.jsonl:3"),
            {"messages": [{"role": "user", "content": "a"}], "origin": "f.jsonl:4"},
        ]
    )
    template = Template(make_tokenizer(templates.chatml), max_length=90)
    for _ in range(2):  # the account is kept with the result
        assert len(encode_rows(rows, template)) == 1
        assert "tokenised 4 rows: 1 kept, 3 dropped: 2 x longer than --max_length 90" in caplog.text
        assert "(first: f.jsonl:2, " in caplog.text
        assert "1 x no assistant turn (first: f.jsonl:4)" in caplog.text
        caplog.clear()
    with pytest.raises(UserError, match=r"--strict true: 1 rows .*no assistant turn"):
        encode_rows(rows, template, strict=True)


def test_strict_stops_at_a_bad_row_but_not_at_a_long_one(make_tokenizer, templates):
    long = [standard("a", "b"), standard("a", "word " * 50)]
    template = Template(make_tokenizer(templates.chatml), max_length=90)
    assert len(encode_rows(Dataset.from_list(long), template, strict=True)) == 1
    bad = [*long, {"messages": [{"role": "user", "content": "a"}]}]
    with pytest.raises(UserError, match="--strict true: row 3: no assistant turn"):
        encode_rows(Dataset.from_list(bad), template, strict=True)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_no_row_left(make_tokenizer, templates, num_proc):
    template = Template(make_tokenizer(templates.chatml), max_length=3)
    with pytest.raises(
        UserError, match=r"no row is left .* 4 rows, 4 x longer than --max_length 3"
    ):
        encode_rows(rows_of(4), template, num_proc=num_proc)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_ambiguous_template_names_the_row(make_tokenizer, templates, num_proc):
    template = Template(make_tokenizer(templates.reordered))
    with pytest.raises(UserError, match=r"^row 1: chat template: message 2"):
        encode_rows(rows_of(700), template, num_proc=num_proc)


def test_stripped_thinking_is_reported(make_tokenizer, templates, caplog):
    caplog.set_level(logging.INFO)
    thought = "<think>\nhm\n</think>\n\n"
    turn = standard("a", thought + "b")["messages"]
    encode_rows(
        Dataset.from_list([{"messages": turn + turn}]),
        Template(make_tokenizer(templates.thinking)),
        num_proc=2,
    )
    assert "1 earlier assistant turns are context only" in caplog.text


@pytest.mark.parametrize("num_proc", [1, 2])
def test_chunks_keep_their_order_with_a_bounded_backlog(num_proc):
    taken = []

    def chunks():
        for number in range(20):
            taken.append(number)
            yield number

    results = map_chunks(lambda number: number * number, chunks(), num_proc)
    assert next(results) == 0
    assert len(taken) <= 2 * num_proc
    assert list(results) == [number * number for number in range(1, 20)]


def test_a_killed_worker_is_noticed():
    with pytest.raises(BrokenProcessPool):
        list(map_chunks(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


# Sharing.


def encode_at_once(barrier, template, answers):
    barrier.wait()
    answers.put(encode_rows(rows_of(50), template).lengths().tolist())


def test_processes_at_once_encode_once(counting):
    barrier, answers = fork.Barrier(4), fork.Queue()
    processes = [
        fork.Process(target=encode_at_once, args=(barrier, counting, answers)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    results = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(result == results[0] for result in results)
    assert counting.count() == 50


def die_half_way(folder):
    def build(temporary):
        (temporary / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)

    get_or_build(folder, build)


def test_a_killed_writer_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "store" / "key"
    process = fork.Process(target=die_half_way, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not folder.exists()
    get_or_build(folder, lambda temporary: (temporary / "whole").write_text("y"))
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key", "key.lock"]


def test_a_failed_writer_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "key"

    def fail(temporary):
        (temporary / "half").write_text("x")
        raise UserError("bad data")

    with pytest.raises(UserError, match="bad data"):
        get_or_build(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_a_writer_that_comes_second_in_spite_of_the_lock_gives_way(tmp_path):
    folder = tmp_path / "key"

    def build(temporary):
        folder.mkdir()
        (folder / "first").write_text("x")
        (temporary / "second").write_text("y")

    get_or_build(folder, build)
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


class Slow(Template):
    """Takes time for every row."""

    def encode_many(self, rows):
        time.sleep(0.002 * len(rows))
        return super().encode_many(rows)


def test_a_waiting_process_takes_over_from_one_that_is_killed(make_tokenizer, templates, tmp_path):
    """Its worker processes hold its lock, too, unless they die with it."""
    template = Slow(make_tokenizer(templates.chatml))
    rows = rows_of(3000)
    root = tmp_path / "own"

    def prepare(answers):
        encoded = encode_rows(rows, template, num_proc=2, cache_dir=str(root))
        answers.put(int(encoded.lengths().sum()))

    answers = fork.Queue()
    first, second = (fork.Process(target=prepare, args=(answers,)) for _ in range(2))
    first.start()
    while not list(root.glob(".*tmp-*/tokens.bin")):
        time.sleep(0.01)
    second.start()
    time.sleep(0.3)
    workers = psutil.Process(first.pid).children()
    first.kill()
    found = answers.get(timeout=60)
    second.join()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert len(workers) == 2
    assert not alive
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    assert sorted(path.name for path in folder.iterdir()) == [
        *("account.json", "ends.bin", "rows.bin", "tokens.bin")
    ]
    again = encode_rows(rows, Template(template.tokenizer), cache_dir=str(tmp_path / "other"))
    assert again.lengths().sum() == found


def test_a_selection_keeps_its_order_and_its_copies(make_tokenizer, templates):
    rows = Dataset.from_list(
        [standard("a", "word " * 60 if index == 5 else f"fox {index}") for index in range(9)]
    )
    template = Template(make_tokenizer(templates.chatml), max_length=90)
    chosen = [8, 5, 2, 2, 7, 5, 8, 0]
    encoded = encode_rows(rows.select(chosen), template)
    kept = [template.encode(rows[index])["input_ids"] for index in chosen if index != 5]
    assert [row["input_ids"].tolist() for row in encoded] == kept
    assert encoded.lengths().tolist() == [len(ids) for ids in kept]
    assert encoded.rows().tolist() == [0, 1, 3, 4]  # of 0, 2, 5, 7 and 8, each encoded once
