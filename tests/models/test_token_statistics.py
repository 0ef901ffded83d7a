"""Statistics of whole logits, in blocks and in columns of ranks, against plain formulas."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftmeg.models import head
from tests.ranks import run_ranks

WORDS, COLUMNS = 21, 24


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """[s, b, v] with three columns of padding, and labels [b, s], one of them the likeliest."""
    torch.manual_seed(3)
    logits = torch.randn(5, 2, COLUMNS) * 4
    logits[..., WORDS:] = torch.finfo(logits.dtype).min
    labels = torch.randint(0, WORDS, (2, 5))
    labels[1, 2] = logits[2, 1].argmax()
    return logits, labels


def statistics(block: int) -> list[dict[str, Any]]:
    """What this rank finds, which has its part of the columns."""
    head._BLOCK_ELEMENTS = block
    logits, labels = logits_and_labels()
    group = torch.distributed.group.WORLD
    assert group is not None
    mine = logits.chunk(group.size(), dim=-1)[group.rank()]
    layer = SimpleNamespace(tp_group=group, vocab_size=WORDS)
    vocabulary = head._vocabulary(layer, mine.shape[-1])
    rows, wanted = mine.flatten(0, 1), labels.t().reshape(-1) - vocabulary.first
    sums = head._over_blocks(lambda here: rows[here], wanted, vocabulary, rows.shape[1])
    found = head.TokenStatistics()
    found.fill(head._facts(sums, vocabulary), mine.shape[:2])
    return [{name: value.numpy() for name, value in vars(found).items()}]


@pytest.mark.parametrize(("world", "block"), [(1, 1 << 20), (2, 36)])
def test_statistics_are_those_of_whole_logits(world: int, block: int) -> None:
    logits, labels = logits_and_labels()
    words = logits[..., :WORDS].transpose(0, 1)
    logs = words.log_softmax(dim=-1)
    expected = {
        "entropy": -(logs.exp() * logs).sum(dim=-1),
        "mean_logit": words.mean(dim=-1),
        "log_collision": (2 * logs).logsumexp(dim=-1),
        "is_likeliest": (words.argmax(dim=-1) == labels).float(),
    }
    for (found,) in run_ranks(world, statistics, block):
        assert found["is_likeliest"][1, 2] == 1
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(found[name]), value, msg=name)
