"""The order of rows: the same for every layout, complete in every epoch, exact after resuming."""

import itertools

import pytest

from swiftmeg.data.collate import Collator
from swiftmeg.data.loader import BatchLoader, EvalLoader, eval_iters, train_iters
from swiftmeg.errors import UserError


class Numbers:
    """Row i is its own number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return index


def global_batches(rows, count, mbs, gbs, dp, **options):
    """The first `count` global batches as lists of rows, in the order of micro-batch and rank."""
    per_rank = [
        itertools.islice(
            BatchLoader(
                Numbers(rows),
                list,
                micro_batch_size=mbs,
                global_batch_size=gbs,
                dp_rank=rank,
                dp_size=dp,
                **options,
            ),
            count * gbs // (mbs * dp),
        )
        for rank in range(dp)
    ]
    rows_in_order = [row for step in zip(*per_rank, strict=True) for micro in step for row in micro]
    return [rows_in_order[start : start + gbs] for start in range(0, len(rows_in_order), gbs)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 30, 101])
def test_layouts_and_resuming_do_not_change_the_stream(rows, shuffle):
    gbs, count = 12, 6
    whole = global_batches(rows, count, 1, gbs, 1, shuffle=shuffle)
    for mbs, dp in [(1, 2), (2, 1), (2, 2), (3, 4), (12, 1), (1, 12)]:
        assert global_batches(rows, count, mbs, gbs, dp, shuffle=shuffle) == whole
        for done in (1, 4):
            resumed = global_batches(
                rows, count - done, mbs, gbs, dp, shuffle=shuffle, consumed_samples=done * gbs
            )
            assert resumed == whole[done:]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_is_complete_and_none_is_alike(shuffle):
    stream = list(itertools.chain(*global_batches(10, 6, 2, 10, 1, shuffle=shuffle)))
    epochs = [stream[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    if shuffle:
        assert len({tuple(epoch) for epoch in epochs}) == 6
    else:
        assert stream == list(range(10)) * 6


def test_epochs_run_through_global_batches():
    stream = list(itertools.chain(*global_batches(10, 5, 1, 4, 2)))
    assert sorted(stream[:10]) == list(range(10))
    assert sorted(stream[10:]) == list(range(10))


def test_the_seed_decides_the_order():
    assert global_batches(50, 2, 1, 20, 1, seed=1) == global_batches(50, 2, 1, 20, 1, seed=1)
    assert global_batches(50, 2, 1, 20, 1, seed=1) != global_batches(50, 2, 1, 20, 1, seed=2)


def test_workers_keep_the_order():
    assert global_batches(20, 3, 2, 4, 1, num_workers=2) == global_batches(20, 3, 2, 4, 1)


def rows_of_length_one(count):
    return [{"input_ids": [5, index + 10], "labels": [-100, index + 10]} for index in range(count)]


def evaluations(rows, mbs, gbs, dp, repeats=2, padding_free=True):
    loaders = [
        EvalLoader(
            rows,
            Collator(0, padding_free),
            micro_batch_size=mbs,
            global_batch_size=gbs,
            dp_rank=rank,
            dp_size=dp,
        )
        for rank in range(dp)
    ]
    return [[list(loader) for loader in loaders] for _ in range(repeats)]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (1, 4), (2, 2), (4, 2)])
@pytest.mark.parametrize("padding_free", [True, False])
def test_evaluation_sees_every_row_once_each_time(count, mbs, dp, padding_free):
    for ranks in evaluations(rows_of_length_one(count), mbs, 8, dp, padding_free=padding_free):
        assert {len(batches) for batches in ranks} == {eval_iters(count, 8) * 8 // (mbs * dp)}
        labels = [batch["labels"].flatten().tolist() for batches in ranks for batch in batches]
        trained = [label for batch in labels for label in batch if label != -100]
        assert sorted(trained) == list(range(10, 10 + count))


def test_evaluation_fills_up_with_rows_of_packs():
    packs = [rows_of_length_one(2), rows_of_length_one(1)]
    ((batches,),) = evaluations(packs, 1, 4, 1, repeats=1)
    assert [int((batch["labels"] != -100).sum()) for batch in batches] == [2, 1, 0, 0]


def test_filler_rows_have_no_trained_token():
    rows = [{"input_ids": [5], "labels": [5], "length": 1}]
    loader = EvalLoader(rows, list, micro_batch_size=1, global_batch_size=3, dp_rank=0, dp_size=1)
    filler = {"input_ids": [5], "labels": [-100], "length": 1}
    assert list(loader) == [rows, [filler], [filler]]


def test_evaluation_repeats_for_ever():
    loader = EvalLoader(
        Numbers(3), list, micro_batch_size=1, global_batch_size=3, dp_rank=0, dp_size=1
    )
    assert list(itertools.islice(loader.repeat(), 7)) == [[0], [1], [2], [0], [1], [2], [0]]


def test_iterations():
    assert train_iters(100, 3, 16) == 18
    assert train_iters(16, 1, 16) == 1
    assert [eval_iters(rows, 8) for rows in (0, 1, 8, 9)] == [0, 1, 1, 2]
    with pytest.raises(UserError, match=r"--max_epochs 1: 15 rows .* --global_batch_size 16"):
        train_iters(15, 1, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch_size": 6},
            r"--global_batch_size 6: .* --micro_batch_size 2 .* size 2 \(= 4",
        ),
        ({"micro_batch_size": 0}, "--micro_batch_size 0 .* at least 1"),
        ({"consumed_samples": 3}, "after 3 samples, which is not a multiple"),
        ({"dataset": Numbers(0)}, "the training dataset is empty: check --dataset"),
    ],
)
def test_bad_sizes(options, message):
    sizes = {"micro_batch_size": 2, "global_batch_size": 4, "dp_rank": 0, "dp_size": 2, **options}
    with pytest.raises(UserError, match=message):
        BatchLoader(sizes.pop("dataset", Numbers(3)), list, **sizes)
