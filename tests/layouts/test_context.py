"""Context parallelism: attention's outputs and gradients are those of one process."""

from typing import Any

import pytest
import torch

from swiftmeg.data.collate import Collator
from tests.ranks import run_ranks

LENGTHS = [1, 7, 9, 698]
HEADS, GROUPS, CHANNELS, VALUES = 4, 2, 8, 6  # values narrower than keys, as in MLA


def inputs(total: int, batch: int | None) -> list[torch.Tensor]:
    """Queries, keys, values and the output's gradient of the whole batch."""
    torch.manual_seed(3)
    lead = (total,) if batch is None else (total, batch)
    shapes = [(HEADS, CHANNELS), (GROUPS, CHANNELS), (GROUPS, VALUES), (HEADS * VALUES,)]
    return [torch.randn(*lead, *shape, dtype=torch.float64) for shape in shapes]


def attend(borders: list[int], batch: int | None, cp: int) -> list[Any]:
    """This rank's output and gradients of query, key and value."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from swiftmeg.models.context import held
    from swiftmeg.models.native.attention import DotProductAttention

    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        context_parallel_size=cp,
        attention_dropout=0.0,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    attention = DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    edges = torch.tensor(borders, dtype=torch.int32)
    packed = None
    if batch is None:
        longest = int(edges.diff().max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=edges,
            cu_seqlens_kv=edges,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    places = held(edges, borders[-1], groups.cp.rank(), cp) if cp > 1 else slice(None)
    query, key, value, gradient = (each[places].clone() for each in inputs(borders[-1], batch))
    parts = [each.requires_grad_() for each in (query, key, value)]
    out = attention(*parts, None, packed_seq_params=packed)
    out.backward(gradient)
    # arrays, because tensors would travel through memory of a process that has ended
    return [each.numpy() for each in (out.detach(), *(each.grad for each in parts))]


def joined(results: list[Any], borders: list[int]) -> list[torch.Tensor]:
    """What all ranks hold, in the order of the batch."""
    from swiftmeg.models.context import held

    size, total = len(results), borders[-1]
    places = [held(torch.tensor(borders), total, rank, size) for rank in range(size)]
    order = torch.cat(places).argsort()
    assert torch.equal(torch.cat(places)[order], torch.arange(total)), "not each place once"
    tensors = [[torch.from_numpy(each) for each in result] for result in results]
    return [torch.cat(parts)[order] for parts in zip(*tensors, strict=True)]


def padded_borders(cp: int) -> list[int]:
    """Borders of LENGTHS, each padded as the collator does."""
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in LENGTHS]
    batch = Collator(0, segment_multiple=2 * cp, pad_to_multiple_of=2 * cp)(rows)
    return batch["cu_seqlens"].tolist()


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("batch", [None, 2], ids=["packed", "padded"])
def test_attention_over_ranks_is_attention(cp: int, batch: int | None) -> None:
    borders = padded_borders(cp) if batch is None else [0, 24 * cp]
    (whole,) = run_ranks(1, attend, borders, batch, 1)
    whole = [torch.from_numpy(each) for each in whole]
    parts = joined(run_ranks(cp, attend, borders, batch, cp), borders)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)


def test_padding_within_segments_changes_nothing() -> None:
    """Each sample attends as it does alone, whatever it is padded to."""
    borders = padded_borders(4)
    (whole,) = run_ranks(1, attend, borders, None, 1)
    query, key, value, _ = inputs(borders[-1], None)
    for start, length in zip(borders, LENGTHS, strict=False):
        q, k, v = (x[start : start + length].transpose(0, 1)[None] for x in (query, key, value))
        alone = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        found = torch.from_numpy(whole[0])[start : start + length].unflatten(-1, (HEADS, VALUES))
        torch.testing.assert_close(found, alone[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cp", [2, 4])
def test_samples_are_padded_to_whole_chunks(cp: int) -> None:
    rows = [{"input_ids": list(range(1, n + 1)), "labels": [9] * n} for n in LENGTHS]
    collate = Collator(0, segment_multiple=2 * cp, pad_to_multiple_of=6 * cp)
    batch = collate(rows)
    borders = batch["cu_seqlens"]
    assert (borders.diff() % (2 * cp) == 0).all()
    assert batch["input_ids"].shape[1] == borders[-1] == -(-borders[4] // (6 * cp)) * 6 * cp
    assert int(batch["num_tokens"]) == sum(LENGTHS)
    assert int((batch["labels"] != -100).sum()) == sum(LENGTHS) - len(LENGTHS)
    for start, row in zip(borders.tolist(), rows, strict=False):
        assert (
            batch["input_ids"][0, start : start + len(row["input_ids"])].tolist()
            == row["input_ids"]
        )
        assert batch["position_ids"][0, start] == 0
