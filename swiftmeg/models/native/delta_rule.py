"""The gated delta rule (arXiv:2412.06464) over many sequences at once, chunk by chunk.

A state S of keys by values forgets and corrects itself at every token:

    S_t = a_t S_(t-1) + b_t k_t (v_t - a_t S_(t-1)^T k_t)^T,    o_t = S_t^T q_t

Within a chunk all corrections solve one triangular system (the paper's section 3.3), so that matrix
products replace the walk over tokens; only the states at the borders of chunks follow one another.
"""

from itertools import accumulate

import torch
from torch import Tensor

CHUNK = 64
"""Tokens that are computed together; the published kernels' number."""


class Chunks:
    """Where tokens stand when every sequence is cut into chunks of CHUNK places.

    Chunks are in the order of their number within their sequence, and among those of one number the
    longest sequence's comes first: so the sequences that go on are always the first ones.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        counts = torch.tensor([-(-length // CHUNK) for length in lengths])
        order = counts.argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(lengths))
        self.active = [int((counts > number).sum()) for number in range(int(counts.max()))]
        """How many sequences have a chunk of each number."""
        first = torch.tensor(list(accumulate(self.active, initial=0)))
        each = torch.tensor(lengths)
        sequence = torch.repeat_interleave(each)
        place = torch.arange(len(sequence)) - (each.cumsum(0) - each)[sequence]
        chunk = first[place // CHUNK] + rank[sequence]
        self.places = (chunk * CHUNK + place % CHUNK).to(device)
        """The place of each token among those of all chunks: int64 [tokens]."""

    def cut(self, tokens: Tensor) -> Tensor:
        """[tokens, ...] to [chunks, CHUNK, ...], with zeros where sequences end before chunks."""
        shape = (sum(self.active) * CHUNK, *tokens.shape[1:])
        return tokens.new_zeros(shape).index_copy(0, self.places, tokens).unflatten(0, (-1, CHUNK))

    def join(self, chunks: Tensor) -> Tensor:
        """[chunks, CHUNK, ...] to [tokens, ...]."""
        return chunks.flatten(0, 1)[self.places]


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, chunks: Chunks
) -> Tensor:
    """The outputs [tokens, groups, heads, v] of sequences, whose tokens follow one another.

    query and key [tokens, groups, k] serve all heads of their group; value [tokens, groups, heads,
    v]; log_decay (ln a, at most 0) and beta [tokens, groups, heads]. Computed in their dtype, which
    should be float32. Every sequence begins with a state of zeros.
    """
    q, k = (chunks.cut(x).movedim(1, 2)[:, :, None] for x in (query, key))
    v = chunks.cut(value).movedim(1, 3)
    past, b = (chunks.cut(x).movedim(1, 3) for x in (log_decay, beta))
    past = past.cumsum(dim=-1)  # of everything since the chunk began
    seen = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    between = (past[..., :, None] - past[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    b, since = b[..., None], past.exp()[..., None]
    k_turned = k.transpose(-1, -2)
    # What stands on and above the diagonal is never read.
    system = (k @ k_turned) * between * b
    targets = torch.cat([v * b, k * (b * since)], dim=-1)
    solved = torch.linalg.solve_triangular(system, targets, upper=False, unitriangular=True)
    steps = (
        *solved.split([v.shape[-1], k.shape[-1]], dim=-1),
        (q @ k_turned) * between,
        q * since,
        (k * (past[..., -1:] - past).exp()[..., None]).transpose(-1, -2),
        past[..., -1].exp()[..., None, None],
    )
    groups, heads = value.shape[1:3]
    state = v.new_zeros(chunks.active[0], groups, heads, key.shape[-1], value.shape[-1])
    outputs = []
    for own, known, scores, asked, written, kept in zip(
        *(step.split(chunks.active) for step in steps), strict=True
    ):
        state = state[: len(own)]
        change = own - known @ state
        outputs.append(asked @ state + scores @ change)
        state = state * kept + written @ change
    return chunks.join(torch.cat(outputs).movedim(3, 1))
