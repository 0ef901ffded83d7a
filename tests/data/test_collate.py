"""Micro-batches: shapes, shifted labels, borders between samples, packs."""

import random

import numpy as np
import pytest
import torch

from swiftmeg.data.collate import Collator
from swiftmeg.data.encoded.packing import WINDOW, PackedDataset, pack
from swiftmeg.errors import UserError

PAD = 99


def row(*tokens, trained=1):
    """A row whose last `trained` tokens are trained."""
    untrained = len(tokens) - trained
    return {"input_ids": list(tokens), "labels": [-100] * untrained + list(tokens[untrained:])}


def test_padding_free():
    batch = Collator(PAD)([row(1, 2, 3, trained=2), row(4, 5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[2, 3, -100, 5, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5]
    assert batch["max_seqlen"].tolist() == 3
    kinds = {name: tensor.dtype for name, tensor in batch.items()}
    assert kinds == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "cu_seqlens": torch.int32,
        "max_seqlen": torch.int32,
        "num_tokens": torch.int64,
        "samples": torch.int64,
        "weights": torch.float32,
        "num_samples": torch.int64,
    }
    assert batch["num_samples"].item() == 2
    assert batch["max_seqlen"].dim() == 0


@pytest.mark.parametrize("options", [{"pad_to_multiple_of": 8}, {"fixed_length": 8}])
def test_padding_is_a_segment_of_its_own(options):
    batch = Collator(PAD, **options)([row(1, 2, 3), row(4, 5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 3, -100, 5, -100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert batch["samples"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert batch["num_tokens"].item() == 5


def test_padding_within_a_segment_belongs_to_no_sample():
    batch = Collator(PAD, segment_multiple=4, pad_to_multiple_of=4)([row(1, 2, 3), row(4, 5)])
    assert batch["cu_seqlens"].tolist() == [0, 4, 8]
    assert batch["samples"].tolist() == [[1, 1, 1, 0, 2, 2, 0, 0]]


def test_weights_go_with_the_labels():
    weighted = {**row(1, 2, 3), "loss_scale": [0.0, 2.0, 0.5]}
    rows = [[weighted, row(7, 8)], row(4, 5)]  # a pack, and a row that fills up
    flat = Collator(PAD, segment_multiple=4, pad_to_multiple_of=4)(rows)["loss_scale"]
    assert flat.dtype == torch.float32
    assert flat.tolist() == [[2.0, 0.5, *[1.0] * 10]]
    padded = Collator(PAD, padding_free=False)([weighted, row(4, 5)])["loss_scale"]
    assert padded.tolist() == [[2.0, 0.5, 1.0], [1.0, 1.0, 1.0]]
    assert "loss_scale" not in Collator(PAD)([row(4, 5)])


@pytest.mark.parametrize("padding_free", [True, False])
def test_what_labels_count_for(padding_free):
    rows = [row(1, 2, 3, trained=2), row(4, 5, 6, trained=1), row(7, 8, trained=0)]
    weights = Collator(PAD, padding_free)(rows)["weights"].flatten().tolist()
    per_sample = Collator(PAD, padding_free, sample_weight=0.5)(rows)["weights"].flatten().tolist()
    ends = [0, 0] if padding_free else [0, 0, 0]
    assert weights == [1, 1, 0, 0, 1, 0, *ends]
    assert per_sample == [0.25, 0.25, 0, 0, 0.5, 0, *ends]


def test_sides_of_a_pair_are_samples_of_their_own():
    pairs = [{"chosen": row(1, 2), "rejected": row(3)}, {"chosen": row(4), "rejected": row(5)}]
    for items in (pairs, [pairs]):  # by themselves, and in a pack
        batch = Collator(PAD)(items)
        assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
        assert batch["samples"].tolist() == [[1, 1, 2, 3, 4]]
        assert batch["num_samples"].item() == 4


def test_a_full_row_gets_no_padding():
    batch = Collator(PAD, pad_to_multiple_of=5)([row(1, 2, 3), row(4, 5)])
    assert batch["cu_seqlens"].tolist() == [0, 3, 5]


@pytest.mark.parametrize("options", [{"pad_to_multiple_of": 4}, {"fixed_length": 4}])
def test_padded(options):
    batch = Collator(PAD, padding_free=False, **options)([row(1, 2, 3, trained=2), row(4, 5)])
    assert batch.keys() == {
        "input_ids", "labels", "position_ids", "samples", "weights", "num_tokens", "num_samples",
    }  # fmt: skip
    assert batch["samples"].tolist() == [[1, 1, 1, 0], [2, 2, 0, 0]]
    assert batch["num_tokens"].item() == 5
    assert batch["input_ids"].tolist() == [[1, 2, 3, PAD], [4, 5, PAD, PAD]]
    assert batch["labels"].tolist() == [[2, 3, -100, -100], [5, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch["weights"].dtype == torch.float32
    others = {tensor.dtype for name, tensor in batch.items() if name != "weights"}
    assert others == {torch.int64}


def test_nothing_is_predicted_across_a_border():
    rows = [row(1, 2, 3, trained=2), row(4, 5, 6, trained=3)]  # the first of the second is trained
    assert Collator(PAD)(rows)["labels"].tolist() == [[2, 3, -100, 5, 6, -100]]


@pytest.mark.parametrize("padding_free", [True, False])
def test_bad_micro_batches(padding_free):
    collator = Collator(PAD, padding_free, fixed_length=4)
    with pytest.raises(UserError, match="of 5 tokens is longer than the fixed length 4"):
        collator([row(1, 2, 3, 4, 5)])
    with pytest.raises(ValueError, match="at least one row"):
        collator([])
    with pytest.raises(UserError, match="the fixed length 6 is not a multiple of 4"):
        Collator(PAD, padding_free, pad_to_multiple_of=4, fixed_length=6)


# Packing.


def test_every_row_is_in_one_pack_that_it_fits():
    chooser = random.Random(0)
    lengths = [chooser.randint(1, 100) for _ in range(WINDOW + 500)]
    packs = pack(lengths, 100)
    assert sorted(index for group in packs for index in group) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in group) for group in packs) <= 100
    assert sum(lengths) / (100 * len(packs)) > 0.98
    assert packs == pack(lengths, 100)


def first_fit_decreasing(lengths, limit):
    """As the textbook has it, in quadratic time."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for group in groups:
            if sum(lengths[other] for other in group) + lengths[index] <= limit:
                group.append(index)
                break
        else:
            groups.append([index])
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 33, 64])
def test_packs_equal_the_textbook(count):
    chooser = random.Random(count)
    lengths = [chooser.randint(1, 20) for _ in range(count)]
    assert pack(lengths, 20) == first_fit_decreasing(lengths, 20)


def test_a_row_too_long_for_a_pack():
    with pytest.raises(UserError, match="row 2 has 11 tokens, more than --max_length 10"):
        pack([3, 11], 10)


class Rows(list):
    """Encoded rows in memory, as packing wants them."""

    def lengths(self):
        return np.array([len(row["input_ids"]) for row in self])


def test_packed_rows_keep_their_borders():
    rows = [row(1, 2, 3), row(4, 5), row(6, 7, 8), row(9, 10)]
    packed = PackedDataset(Rows(rows), 5)
    assert len(packed) == 2
    assert packed.fill == 1.0
    batch = Collator(PAD)([packed[0], packed[1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8, 10]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1]]


def test_packs_of_several_windows_hold_each_row_once():
    lengths = [number % 7 + 1 for number in range(3 * WINDOW // 2)]
    packed = PackedDataset(
        Rows(row(*[number] * lengths[number]) for number in range(len(lengths))), 20
    )
    expected = pack(lengths, 20)
    assert len(packed) == len(expected)
    for index in (0, 1, len(packed) // 2, len(packed) - 1):
        assert [each["input_ids"][0] for each in packed[index]] == expected[index]
    assert packed.fill == sum(lengths) / (20 * len(packed))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_packs_of_many_rows_are_full(sigma):
    """Log-normal lengths of mean 400, as of conversations; a fifth of the size that docs state."""
    draws = np.random.default_rng(0).lognormal(np.log(400) - sigma**2 / 2, sigma, 20_000)
    lengths = np.clip(draws.astype(int), 1, 4096).tolist()
    packs = pack(lengths, 4096)
    assert sorted(row for group in packs for row in group) == list(range(20_000))
    assert max(sum(lengths[row] for row in group) for group in packs) <= 4096
    assert sum(lengths) / (4096 * len(packs)) >= 0.99
