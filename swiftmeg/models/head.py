"""The language model's head: projection to the vocabulary and cross entropy, never whole logits.

Blocks of tokens are projected, reduced to a few numbers a token and forgotten; the backward pass
projects them again. So the memory is that of one block, whatever the vocabulary, for one product
more in the backward pass. Rows that pad the vocabulary are left out of the softmax.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ReduceOp

from swiftmeg.models.kernels import weight_gradient
from swiftmeg.models.kernels.cross_entropy import RowSums, gradient_, row_sums

_BLOCK_ELEMENTS = 1 << 28
"""Logits of a block: 512 MiB in bf16, enough rows to keep a GPU's products at full speed."""


@dataclass
class TokenStatistics:
    """What a forward pass knows of each token's distribution beside its loss, fp32 [b, s].

    A forward pass with `output_options(model, statistics)` fills them in. They have no gradient.
    """

    entropy: Tensor = field(init=False)
    """In nats."""
    mean_logit: Tensor = field(init=False)
    """Over the vocabulary."""
    log_collision: Tensor = field(init=False)
    """The logarithm of the sum of squared probabilities."""
    is_likeliest: Tensor = field(init=False)
    """1 where no logit is larger than the label's, else 0."""

    def fill(self, facts: Iterable[Tensor], shape: torch.Size) -> None:
        """Take each statistic, fp32 [s * b], of `shape` (s, b)."""
        self.entropy, self.mean_logit, self.log_collision, self.is_likeliest = (
            each.view(shape).t().contiguous() for each in facts
        )


class _Vocabulary(NamedTuple):
    """The columns of the logits that this rank computes."""

    first: int
    """The id of the first."""
    words: int
    """How many of them are words; those behind pad the vocabulary."""
    size: int
    """Words of all ranks."""
    group: torch.distributed.ProcessGroup
    sums_gradients: bool = False
    """Whether the ranks' gradients of the hidden states are summed here."""
    accumulates: bool = False
    """Whether the gradient of the weight is added to Megatron's buffer."""


def prepare(model: Any, vocab_size: int, *, in_blocks: bool, accumulates: bool) -> None:
    """Tell the head of a GPTModel how many rows of its weight are words; those behind are padding.

    The padding's logits win no softmax, neither here nor where the output layer makes whole logits
    (`in_blocks` false). `accumulates`: weight gradients are added to Megatron's buffers where they
    are computed.
    """
    if not model.post_process:
        return
    layer = model.output_layer
    layer.vocab_size, layer.in_blocks, layer.accumulates = vocab_size, in_blocks, accumulates
    rows = model.vocab_size // layer.tp_group.size()
    words = _words_here(layer, rows)
    if words == rows:
        return

    def mask(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        logits, bias = output
        logits[..., words:] = torch.finfo(logits.dtype).min
        return logits, bias

    layer.register_forward_hook(mask)


def _words_here(layer: Any, rows: int) -> int:
    return int(max(0, min(rows, layer.vocab_size - rows * layer.tp_group.rank())))


def skips_logits(output_layer: Any) -> bool:
    """Whether `token_losses` stands for `output_layer`: Megatron's own, that is without adapters.

    `--cross_entropy_loss_fusion false` asks for whole logits.
    """
    return type(output_layer) is ColumnParallelLinear and output_layer.in_blocks


def output_options(model: Any, statistics: TokenStatistics | None = None) -> dict[str, Any]:
    """What to call a GPTModel with labels with, to get each token's cross entropy, fp32 [b, s].

    The last pipeline stage fills in the `statistics` too.
    """
    if not model.post_process:
        return {}
    in_blocks = skips_logits(model.output_layer)
    processor = token_losses if in_blocks else losses_of_whole_logits
    return {"output_processor": processor, "output_processor_context": statistics}


def losses_of_whole_logits(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    context: TokenStatistics | None = None,
    **others: Any,
) -> Tensor:
    """Return what `token_losses` does, by way of the output layer, whatever it is."""
    logits, _ = output_layer(hidden_states, weight=output_weight)
    if context is not None:
        layer = getattr(output_layer, "base_layer", output_layer)  # adapters stand around it
        vocabulary = _vocabulary(layer, logits.shape[-1])
        rows = logits.detach().flatten(0, 1)
        wanted = labels.t().reshape(-1) - vocabulary.first
        sums = _over_blocks(lambda here: rows[here], wanted, vocabulary, rows.shape[1])
        context.fill(_facts(sums, vocabulary), logits.shape[:2])
    return compute_language_model_loss(labels, logits)


def token_losses(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: TokenStatistics | None = None,
    **others: Any,
) -> Tensor:
    """Return each token's cross entropy, fp32 [b, s], for `hidden_states` [s, b, h].

    An `output_processor` of Megatron's GPTModel. `labels` [b, s] are ids. Under sequence
    parallelism the hidden states are this rank's [s / TP, b, h].
    """
    weight = output_layer.weight if output_weight is None else output_weight
    group = output_layer.tp_group
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, True, group=group)
    vocabulary = _vocabulary(output_layer, len(weight))._replace(
        sums_gradients=not output_layer.sequence_parallel and group.size() > 1,
        accumulates=output_layer.accumulates and weight_gradient.has_buffer(weight),
    )
    losses, *facts = _TokenLosses.apply(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        weight,
        labels.t().reshape(-1) - vocabulary.first,
        vocabulary,
    )
    shape = hidden_states.shape[:2]
    if context is not None:
        context.fill(facts, shape)
    return losses.view(shape).t().contiguous()


class _TokenLosses(torch.autograd.Function):
    """Losses and the statistics of `TokenStatistics`, fp32 [t] each, of hidden [t, h].

    The labels [t] are columns of this rank; others, also negative ones, are of another rank.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: _Vocabulary
    ) -> tuple[Tensor, ...]:
        sums = _over_blocks(lambda here: hidden[here] @ weight.t(), labels, vocabulary, len(weight))
        log_total = sums.total.log() + sums.largest
        ctx.save_for_backward(hidden, weight, labels, log_total)
        ctx.vocabulary = vocabulary
        facts = _facts(sums, vocabulary)
        ctx.mark_non_differentiable(*facts)
        return log_total - sums.target, *facts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_total = ctx.saved_tensors
        vocabulary: _Vocabulary = ctx.vocabulary
        grad_hidden = torch.empty_like(hidden)
        buffer = grad_weight = None
        if ctx.needs_input_grad[1]:
            if vocabulary.accumulates:
                buffer, grad_weight = weight.main_grad, weight_gradient.placeholder(weight)
            else:
                buffer = torch.zeros_like(weight, dtype=torch.float32)
        for here in _blocks(len(hidden), len(weight)):
            logits = hidden[here] @ weight.t()
            gradient_(logits, labels[here], log_total[here], grad[here].float(), vocabulary.words)
            torch.mm(logits, weight, out=grad_hidden[here])
            if buffer is not None:
                weight_gradient.add_product(buffer, logits, hidden[here])
        if vocabulary.sums_gradients:
            torch.distributed.all_reduce(grad_hidden, group=vocabulary.group)
        if grad_weight is None and buffer is not None:
            grad_weight = buffer.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _vocabulary(output_layer: Any, rows: int) -> _Vocabulary:
    """The columns of this rank, `rows` with their padding."""
    group = output_layer.tp_group
    first = rows * group.rank()
    return _Vocabulary(first, _words_here(output_layer, rows), output_layer.vocab_size, group)


def _over_blocks(
    logits: Callable[[slice], Tensor], labels: Tensor, vocabulary: _Vocabulary, width: int
) -> RowSums:
    """Sums over the vocabulary of all ranks, from `logits(rows)` [rows, width] of this one's."""
    blocks = [
        row_sums(logits(here), labels[here], vocabulary.words)
        for here in _blocks(len(labels), width)
    ]
    return _over_ranks(RowSums(*map(torch.cat, zip(*blocks, strict=True))), vocabulary.group)


def _facts(sums: RowSums, vocabulary: _Vocabulary) -> tuple[Tensor, ...]:
    """The fields of TokenStatistics, fp32 [t] each."""
    return (
        sums.total.log() + sums.largest - sums.weighted / sums.total,
        sums.plain / vocabulary.size,
        sums.squares.log() - 2 * sums.total.log(),
        (sums.target >= sums.largest).float(),
    )


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows`, all but the last equal, whose logits of `width` columns are few enough."""
    count = max(1, -(-rows * width // _BLOCK_ELEMENTS))
    size = max(1, -(-rows // count))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _over_ranks(sums: RowSums, group: torch.distributed.ProcessGroup) -> RowSums:
    """Join the sums over the columns of every rank."""
    if group.size() == 1:
        return sums
    largest = sums.largest.clone()
    torch.distributed.all_reduce(largest, ReduceOp.MAX, group=group)
    shrink = (sums.largest - largest).exp()
    parts = [sums.total * shrink, sums.squares * shrink**2, sums.weighted * shrink]
    rest = torch.stack([*parts, sums.plain, sums.target])
    torch.distributed.all_reduce(rest, group=group)
    return RowSums(largest, *rest.unbind())
