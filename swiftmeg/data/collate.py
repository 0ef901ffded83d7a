"""From encoded rows to the tensors of a micro-batch."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from swiftmeg.data.template import IGNORE
from swiftmeg.errors import UserError


class Collator:
    """Joins encoded rows into one micro-batch, with labels already shifted.

    `labels[t]` is the token to predict at position t, so each row's last position has none.
    The length T is rounded up to `pad_to_multiple_of`, and up to `fixed_length` if that is given.

    With `padding_free`, rows lie behind one another in tensors of shape [1, T]: `position_ids`
    start at 0 in each row, `cu_seqlens` (int32, [segments + 1]) holds the borders and `max_seqlen`
    (int32, no dimension) the longest segment. Padding is one more segment at the end. A row may
    be a list of rows (a pack); its rows stay segments of their own.

    Under context parallelism every segment is padded to `segment_multiple` (its own padding is not
    trained on, and no earlier token attends to it), because each is cut into that many chunks.

    Otherwise tensors are [rows, T], padded on the right, without `cu_seqlens`.

    `samples` (int64) numbers the rows of the micro-batch from 1 and is 0 on padding. `num_tokens`
    and `num_samples` (int64, no dimension) count the rows' tokens, padding left out, and the rows.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding_free: bool = True,
        pad_to_multiple_of: int = 1,
        fixed_length: int | None = None,
        segment_multiple: int = 1,
    ) -> None:
        if fixed_length is not None and fixed_length % pad_to_multiple_of:
            raise UserError(
                f"the fixed length {fixed_length} is not a multiple of {pad_to_multiple_of}, as "
                "the parallel layout needs: change --max_length or --seq_length"
            )
        self.pad_token_id = pad_token_id
        self.padding_free = padding_free
        self.pad_to_multiple_of = pad_to_multiple_of
        self.fixed_length = fixed_length
        self.segment_multiple = segment_multiple

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels`, `position_ids` (int64), `num_tokens`, and segments.

        Raises UserError if the rows are longer than `fixed_length`, ValueError for no rows.
        """
        samples = list(_samples(rows))
        if not samples:
            raise ValueError("a micro-batch needs at least one row")
        tokens = sum(len(ids) for ids, _ in samples)
        batch = self._flat(samples) if self.padding_free else self._padded(samples)
        return batch | {
            "num_tokens": torch.tensor(tokens),
            "num_samples": torch.tensor(len(samples)),
        }

    def _flat(self, samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        real = [len(ids) for ids, _ in samples]
        samples = [self._whole_chunks(ids, labels) for ids, labels in samples]
        lengths = [len(ids) for ids, _ in samples]
        padding = self._padded_length(sum(lengths)) - sum(lengths)
        if padding:
            samples = [*samples, self._filling(padding)]
            lengths.append(padding)
            real.append(0)
        numbers = [
            (torch.arange(length) < inside) * number
            for number, (inside, length) in enumerate(zip(real, lengths, strict=True), 1)
        ]
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return {
            "input_ids": torch.cat([ids for ids, _ in samples])[None],
            "labels": torch.cat([labels for _, labels in samples])[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "samples": torch.cat(numbers)[None],
            "cu_seqlens": borders,
            "max_seqlen": torch.tensor(max(lengths), dtype=torch.int32),
        }

    def _whole_chunks(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pad one sample to `segment_multiple`."""
        missing = -len(ids) % self.segment_multiple
        if not missing:
            return ids, labels
        more_ids, more_labels = self._filling(missing)
        return torch.cat([ids, more_ids]), torch.cat([labels, more_labels])

    def _padded(self, samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        width = self._padded_length(max(len(ids) for ids, _ in samples))
        input_ids = torch.full((len(samples), width), self.pad_token_id)
        labels = torch.full((len(samples), width), IGNORE)
        numbers = torch.zeros((len(samples), width), dtype=torch.int64)
        for index, (ids, targets) in enumerate(samples):
            input_ids[index, : len(ids)] = ids
            labels[index, : len(ids)] = targets
            numbers[index, : len(ids)] = index + 1
        positions = torch.arange(width).repeat(len(samples), 1)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": positions,
            "samples": numbers,
        }

    def _padded_length(self, length: int) -> int:
        if self.fixed_length is not None:
            if length > self.fixed_length:
                raise UserError(
                    f"a micro-batch of {length} tokens is longer than the fixed length "
                    f"{self.fixed_length}: lower --max_length or --micro_batch_size"
                )
            return self.fixed_length
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def _filling(self, length: int) -> tuple[Tensor, Tensor]:
        return torch.full((length,), self.pad_token_id), torch.full((length,), IGNORE)


def _samples(rows: Iterable[Any]) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield (ids, shifted labels), both int64 [length], of rows and of the rows in packs."""
    for row in rows:
        if isinstance(row, list):
            yield from _samples(row)
            continue
        ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        labels = torch.as_tensor(row["labels"], dtype=torch.int64)
        yield ids, torch.cat([labels[1:], labels.new_full((1,), IGNORE)])
