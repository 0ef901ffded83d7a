"""Streams: one order for every layout, nothing lost or repeated, exact after resuming."""

import collections
import itertools
import json

import pytest

from swiftmeg.data.standard_row import Drops
from swiftmeg.data.stream.stream import RowStream
from swiftmeg.data.stream.stream_loader import Rest, StreamLoader, StreamPosition
from swiftmeg.data.template.template import Template
from swiftmeg.errors import UserError


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


def numbered(tmp_path, count, name="data.jsonl", start=0, bad=lambda number: False):
    """Rows whose answers are numbers; each number's row has a length of its own."""
    return write(
        tmp_path / name,
        (
            "broken" if bad(number) else json.dumps({"text": f"{number} " + "x" * (number % 37)})
            for number in range(start, start + count)
        ),
    )


def order(stream, epoch=0):
    return [
        int(stream.standard(row)["messages"][0]["content"].split()[0])
        for row in stream.epoch(epoch)
    ]


class Encoded(dict):
    """An encoded row: as many tokens as its text has characters, each the row's number."""

    @classmethod
    def of(cls, row):
        text = row["messages"][0]["content"]
        number = int(text.split()[0])
        return cls(input_ids=[number] * len(text), labels=[number] * len(text))


def numbers(sample):
    rows = sample if isinstance(sample, list) else [sample]
    return tuple(row["input_ids"][0] for row in rows)


def collate(samples):
    return [numbers(sample) for sample in samples]


class Job:
    """The ranks of a job that reads a stream, step by step."""

    def __init__(self, stream, mbs, gbs, dp, start=None, **options):
        self.steps = gbs // (mbs * dp)
        self.loaders = [
            StreamLoader(
                stream,
                Encoded.of,
                collate,
                micro_batch_size=mbs,
                global_batch_size=gbs,
                dp_rank=rank,
                dp_size=dp,
                start=start,
                **options,
            )
            for rank in range(dp)
        ]
        self.iterators = [iter(loader) for loader in self.loaders]

    def global_batches(self, count):
        """The samples of the next global batches, in the order of micro-batch and rank."""
        for _ in range(count):
            yield [
                sample
                for _ in range(self.steps)
                for iterator in self.iterators
                for sample in next(iterator)
            ]

    def to_the_end(self):
        """All global batches that all ranks can make, and what is left."""
        found = list(self.steps_before_the_rest())
        self.deal_rest()
        while min([loader.has_step() for loader in self.loaders]):
            found += self.global_batches(1)
        for loader in self.loaders:
            loader.finish()
        return found

    def steps_before_the_rest(self):
        while min([loader.has_step() for loader in self.loaders]):
            yield from self.global_batches(1)

    def deal_rest(self):
        rest = Rest()
        for part in [loader.rest() for loader in self.loaders]:
            rest.merge(part)
        for loader in self.loaders:
            self.left_out = loader.deal(rest)
        samples = [numbers(each) for each in rest.in_turns()]
        self.rest_rows = samples[len(samples) - self.left_out :]

    def position(self):
        """What a checkpoint would keep, written and read."""
        whole = StreamPosition()
        for loader in self.loaders:
            whole.merge(loader.position)
        return StreamPosition.from_json(json.loads(json.dumps(whole.to_json())))


LAYOUTS = [(1, 1), (1, 2), (2, 1), (3, 2), (2, 6), (12, 1)]
PACKED = [None, 60]


@pytest.mark.parametrize("pack_length", PACKED)
@pytest.mark.parametrize("rows", [30, 1501])
def test_layouts_and_resuming_do_not_change_the_samples(tmp_path, monkeypatch, rows, pack_length):
    monkeypatch.setattr("swiftmeg.data.stream.lanes.WINDOW", 4)
    path = numbered(tmp_path, rows, bad=lambda number: number % 7 == 3)
    stream = RowStream([path], shuffle_buffer_size=20)
    options = {"pack_length": pack_length}
    whole = list(Job(stream, 1, 12, 1, **options).global_batches(30))
    for mbs, dp in LAYOUTS:
        first = Job(stream, mbs, 12, dp, **options)
        assert list(first.global_batches(7)) == whole[:7]
        for other_mbs, other_dp in LAYOUTS[::3]:
            position = first.position()
            second = Job(stream, other_mbs, 12, other_dp, position, **options)
            assert list(second.global_batches(9)) == whole[7:16]
            third = Job(stream, mbs, 12, dp, second.position(), **options)
            assert list(third.global_batches(14)) == whole[16:]


@pytest.mark.parametrize("pack_length", PACKED)
def test_every_epoch_has_every_row_once(tmp_path, monkeypatch, pack_length):
    """What lies before every lane's position was seen once an epoch, and nothing else twice."""
    monkeypatch.setattr("swiftmeg.data.stream.lanes.WINDOW", 2)
    path = numbered(tmp_path, 400, bad=lambda number: number % 9 == 0)
    stream = RowStream([path])
    job = Job(stream, 2, 8, 2, pack_length=pack_length)
    seen = collections.Counter()
    while min(position.at for position in job.position().lanes.values()) < 3 * 400:
        for samples in job.global_batches(1):
            seen.update(itertools.chain(*samples))
    behind = max(position.at for position in job.position().lanes.values())
    epochs = -(-behind // 400)
    assert set(seen) == {number for number in range(400) if number % 9}
    assert min(seen.values()) >= 3 - (pack_length is not None)  # the rows that are held
    assert max(seen.values()) <= epochs
    assert sum(seen.values()) <= behind * 8 / 9 + 10


def test_nothing_is_repeated_or_lost_within_an_epoch(tmp_path):
    path = numbered(tmp_path, 1000)
    job = Job(RowStream([path]), 1, 8, 2, pack_length=80)
    seen = collections.Counter()
    for samples in job.global_batches(25):
        seen.update(itertools.chain(*samples))
    assert max(seen.values()) == 1
    assert 400 < len(seen) < 1000


def test_packs_are_full_and_hold_whole_rows(tmp_path):
    path = numbered(tmp_path, 3000)
    job = Job(RowStream([path]), 1, 2, 1, pack_length=200)
    lengths = [
        sum(len(f"{number} ") + number % 37 for number in sample)
        for samples in job.global_batches(100)
        for sample in samples
    ]
    assert max(lengths) <= 200
    assert sum(lengths) / (200 * len(lengths)) > 0.98


@pytest.mark.parametrize("pack_length", PACKED)
@pytest.mark.parametrize("rows", [1, 30, 83])
def test_a_stream_ends_with_its_last_epoch(tmp_path, monkeypatch, rows, pack_length):
    """Every layout makes as many steps; what is not in them is counted, with what is dropped."""
    monkeypatch.setattr("swiftmeg.data.stream.lanes.WINDOW", 4)
    path = numbered(tmp_path, rows, bad=lambda number: number % 7 == 3)
    usable = sum(number % 7 != 3 for number in range(rows))
    kinds = set()
    for mbs, dp, num_workers in [(1, 1, 0), (1, 2, 0), (2, 6, 0), (1, 3, 2)]:
        stream = RowStream([path], shuffle_buffer_size=10)
        options = {"pack_length": pack_length, "num_workers": num_workers}
        job = Job(stream, mbs, 12, dp, epochs=3, **options)
        found = job.to_the_end()
        samples = [sample for batch in found for sample in batch]
        assert all(len(batch) == 12 for batch in found)
        assert job.left_out < 12
        if pack_length is None:
            assert len(samples) + job.left_out == 3 * usable
        assert max(collections.Counter(itertools.chain(*samples)).values(), default=0) <= 3
        assert job.position().drops.total == 3 * (rows - usable)
        kinds.add(json.dumps(found))
    assert len(kinds) == 1
    assert bool(found) == (rows > 1)


@pytest.mark.parametrize("pack_length", PACKED)
def test_a_run_that_ends_can_be_continued_anywhere(tmp_path, monkeypatch, pack_length):
    """Before and among its last steps, and with more epochs behind them."""
    monkeypatch.setattr("swiftmeg.data.stream.lanes.WINDOW", 4)
    path = numbered(tmp_path, 120, bad=lambda number: number % 7 == 3 or number % 4 == 1)
    stream = RowStream([path], shuffle_buffer_size=10)
    options = {"epochs": 2, "pack_length": pack_length}
    whole = Job(stream, 1, 4, 2, **options).to_the_end()
    before = len(list(Job(stream, 1, 4, 2, **options).steps_before_the_rest()))
    assert before < len(whole)
    for made in range(len(whole) + 1):
        first = Job(stream, 1, 4, 2, **options)
        found = list(first.global_batches(min(made, before)))
        if made > before:
            assert not min([loader.has_step() for loader in first.loaders])
            first.deal_rest()
            found += first.global_batches(made - before)
        second = Job(stream, 2, 4, 1, first.position(), **options)
        assert [sorted(batch) for batch in found + second.to_the_end()] == [
            sorted(batch) for batch in whole
        ]
    again = Job(stream, 1, 4, 2, second.position(), **options)
    assert again.to_the_end() == []
    more = Job(stream, 1, 4, 2, second.position(), **options | {"epochs": 3})
    rows = collections.Counter(row for batch in more.to_the_end() for each in batch for row in each)
    assert max(rows.values()) == 1
    usable = sum(number % 7 != 3 and number % 4 != 1 for number in range(120))
    assert usable - len(rows) == sum(map(len, more.rest_rows))


def test_without_shuffling_rows_keep_their_order(tmp_path):
    path = numbered(tmp_path, 40)
    stream = RowStream([path], shuffle_buffer_size=0)
    assert order(stream) == order(stream, epoch=1) == list(range(40))
    batches = Job(stream, 1, 4, 2).global_batches(20)
    for number, samples in enumerate(batches):
        first = number * 4 % 40
        assert sorted(samples) == [(first + place,) for place in range(4)]


def test_shuffling_depends_on_seed_and_epoch(tmp_path):
    path = numbered(tmp_path, 300)
    orders = [
        order(RowStream([path], data_seed=seed, shuffle_buffer_size=size), epoch)
        for seed, size, epoch in [(1, 50, 0), (1, 50, 1), (2, 50, 0), (1, 60, 0), (1, 1000, 0)]
    ]
    assert len({tuple(each) for each in orders}) == 5
    assert all(sorted(each) == list(range(300)) for each in orders)
    assert order(RowStream([path], data_seed=1, shuffle_buffer_size=50)) == orders[0]
    assert max(number - place for place, number in enumerate(orders[0])) <= 50


def test_several_datasets(tmp_path):
    specs = [numbered(tmp_path, 30, "a.jsonl"), numbered(tmp_path, 300, "b.jsonl", start=100)]
    options = {"shuffle_buffer_size": 0}
    assert order(RowStream([specs[0] + "#4", specs[1] + "#2"], **options)) == [0, 1, 2, 3, 100, 101]
    mixed = order(RowStream(specs, interleave_prob=[0.5, 0.5], **options))
    assert [number for number in mixed if number < 100] == list(range(30))
    assert 10 < len(mixed) - 30 < 60
    every = order(
        RowStream(specs, interleave_prob=[0.5, 0.5], stopping_strategy="all_exhausted", **options)
    )
    assert set(every) == set(range(30)) | set(range(100, 400))
    with pytest.raises(UserError, match=r"--interleave_prob 0\.5: 1 values for 2"):
        RowStream(specs, interleave_prob=[0.5])


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_change_nothing(tmp_path, num_workers):
    path = numbered(tmp_path, 200, bad=lambda number: number % 5 == 0)
    stream = RowStream([path])
    whole = list(Job(stream, 1, 8, 1, pack_length=90).global_batches(12))
    job = Job(stream, 1, 8, 2, pack_length=90, num_workers=num_workers)
    assert list(job.global_batches(5)) == whole[:5]
    # Workers are ahead of what was handed out; the position is not.
    again = Job(stream, 1, 8, 2, job.position(), pack_length=90, num_workers=num_workers)
    assert list(again.global_batches(7)) == whole[5:]


def test_the_position_stays_small(tmp_path):
    """However many epochs there were; and resuming does not read them all again."""
    path = numbered(tmp_path, 10)
    stream = RowStream([path])
    job = Job(stream, 1, 2, 1)
    list(job.global_batches(500))
    position = job.position()
    assert {lane.epoch for lane in position.lanes.values()} <= {98, 99, 100}
    assert len(json.dumps(position.to_json())) < 300


def test_dropped_rows_are_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr("swiftmeg.data.stream.lanes.WINDOW", 3)
    path = numbered(tmp_path, 100, bad=lambda number: number % 4 == 0)
    stream = RowStream([path])
    whole = Job(stream, 1, 4, 2, pack_length=70)
    list(whole.global_batches(20))
    position, drops = None, Drops()
    for dp in (1, 2, 4, 2):
        job = Job(stream, 1, 4, dp, position, pack_length=70)
        list(job.global_batches(5))
        position = job.position()
        drops.merge(position.drops)
    assert drops.total > 20
    assert drops.counts == whole.position().drops.counts


def test_strict_stops_with_file_and_line(tmp_path):
    path = numbered(tmp_path, 40, bad=lambda number: number == 17)
    stream = RowStream([path], strict=True, shuffle_buffer_size=0)
    for num_workers in (0, 2):
        job = Job(stream, 1, 4, 1, num_workers=num_workers)
        with pytest.raises(UserError, match=r"^--strict true: .*data.jsonl:18: not JSON") as raised:
            list(job.global_batches(10))
        assert "Traceback" not in str(raised.value)


def test_nothing_usable_ends_in_a_line(tmp_path):
    path = numbered(tmp_path, 40, bad=lambda number: number > 0)
    with pytest.raises(UserError, match="none of 40 rows can be used: 40 x not JSON"):
        RowStream([numbered(tmp_path, 40, "b.jsonl", bad=lambda number: True)]).check()
    with pytest.raises(UserError, match="--dataset: no rows"):
        RowStream([write(tmp_path / "empty.jsonl", [])]).check()
    stream = RowStream([path])
    stream.check()

    def refuse(row):
        from swiftmeg.data.standard_row import RowError

        raise RowError("no")

    loader = StreamLoader(
        stream, refuse, list, micro_batch_size=1, global_batch_size=4, dp_rank=0, dp_size=1
    )
    with pytest.raises(UserError, match="the last 1081 rows could not be used"):
        next(iter(loader))


def test_another_global_batch_size_is_refused(tmp_path):
    stream = RowStream([numbered(tmp_path, 40)])
    job = Job(stream, 1, 4, 1)
    list(job.global_batches(1))
    with pytest.raises(UserError, match=r"--global_batch_size 8: .* was dealt out for 4"):
        Job(stream, 1, 8, 1, job.position())


def test_real_rows_of_all_kinds_of_files(tmp_path, make_tokenizer, templates):
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"query": f"q{number}", "response": str(number)} for number in range(20)]
    write(tmp_path / "d/a.jsonl", map(json.dumps, rows[:5]))
    (tmp_path / "d/b.csv").write_text(
        "query,response\n" + "".join(f"q{i},{i}\n" for i in range(5, 10))
    )
    (tmp_path / "d/c.json").write_text(json.dumps(rows[10:15]))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows[15:]), tmp_path / "d/d.parquet")
    template = Template(make_tokenizer(templates.chatml))
    loader = StreamLoader(
        RowStream([str(tmp_path / "d")]),
        template.encode,
        list,
        micro_batch_size=2,
        global_batch_size=20,
        dp_rank=0,
        dp_size=1,
    )
    texts = [
        template.tokenizer.decode(row["input_ids"])
        for batch in itertools.islice(loader, 10)
        for row in batch
    ]
    assert sorted(texts) == sorted(
        template.tokenizer.decode(template.encode({"messages": turns(row)})["input_ids"])
        for row in rows
    )


def turns(row):
    return [
        {"role": "user", "content": row["query"]},
        {"role": "assistant", "content": row["response"]},
    ]


def test_a_hub_is_streamed(tmp_path, monkeypatch):
    from datasets import IterableDataset

    asked = {}

    def load_dataset(dataset_id, **options):
        asked.update(options, dataset_id=dataset_id)
        return IterableDataset.from_generator(lambda: ({"text": str(i)} for i in range(9)))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    stream = RowStream(["hf::some/data#5"], shuffle_buffer_size=0)
    assert order(stream) == order(stream) == [0, 1, 2, 3, 4]
    assert asked["streaming"] is True
    assert asked["dataset_id"] == "some/data"
