"""From encoded rows to the tensors of a micro-batch."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftmeg.data.template.template import IGNORE
from swiftmeg.errors import UserError

Array = np.ndarray[Any, Any]
Sample = tuple[Sequence[int], Sequence[int], Sequence[float] | None]


def padding_token(tokenizer: Any, vocab_size: int) -> int:
    """Return the id that fills up rows: that of the pad token, else of EOS, else 0.

    No position that is trained attends to it, so any id of the model's vocabulary will do.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((each for each in known if each is not None and 0 <= each < vocab_size), 0)


class Collator:
    """Joins encoded rows into one micro-batch, with labels already shifted.

    `labels[t]` is the token to predict at position t, so each row's last position has none.
    The length T is rounded up to `pad_to_multiple_of`, and up to `fixed_length` if that is given.

    With `padding_free`, rows lie behind one another in tensors of shape [1, T]: `position_ids`
    start at 0 in each row, `cu_seqlens` (int32, [segments + 1]) holds the borders and `max_seqlen`
    (int32, no dimension) the longest segment. Padding is one more segment at the end. A row may
    be a list of rows (a pack) or a dict of them (a pair); its rows stay segments of their own.

    Under context parallelism every segment is padded to `segment_multiple` (its own padding is not
    trained on, and no earlier token attends to it), because each is cut into that many chunks.

    Otherwise tensors are [rows, T], padded on the right, without `cu_seqlens`.

    `weights` (float32) say what the label at its place counts for in the objective's denominator,
    by which everything that is trained on is divided: 1 where it is trained, else 0; or, with
    `sample_weight`, as much in every row that has a trained label, in equal shares of its labels.
    `loss_scale` (float32) is a factor on the loss of the label at its place alone, where rows have
    such factors. `samples` (int64) numbers the rows of the micro-batch from 1 and is 0 on padding.
    `ref_logps` (float32 [rows]) are what rows have under that name: the log-probability of a row's
    answer under a reference model. `num_tokens` and `num_samples` (int64, no dimension) count the
    rows' tokens, padding left out, and the rows.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding_free: bool = True,
        pad_to_multiple_of: int = 1,
        fixed_length: int | None = None,
        segment_multiple: int = 1,
        sample_weight: float | None = None,
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
        self.sample_weight = sample_weight

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels`, `position_ids` (int64), `num_tokens`, and segments.

        Raises UserError if the rows are longer than `fixed_length`, ValueError for no rows.
        """
        flat = list(_flattened(rows))
        samples = [(row["input_ids"], row["labels"], row.get("loss_scale")) for row in flat]
        if not samples:
            raise ValueError("a micro-batch needs at least one row")
        tokens = sum(len(ids) for ids, *_ in samples)
        batch = self._flat(samples) if self.padding_free else self._padded(samples)
        return batch | {
            "weights": self._weights(batch["labels"], batch["samples"]),
            **_reference(flat),
            "num_tokens": torch.tensor(tokens),
            "num_samples": torch.tensor(len(samples)),
        }

    def _flat(self, samples: list[Sample]) -> dict[str, Tensor]:
        real = [len(ids) for ids, *_ in samples]
        lengths = [-(-length // self.segment_multiple) * self.segment_multiple for length in real]
        total = sum(lengths)
        padding = self._padded_length(total) - total
        borders = np.cumsum([0, *lengths])
        if padding:
            lengths.append(padding)
        input_ids = np.full(total + padding, self.pad_token_id)
        labels = np.full(total + padding, IGNORE)
        numbers = np.zeros(total + padding, dtype=np.int64)
        weights = _weights_like(labels, samples)
        for number, (start, sample) in enumerate(zip(borders, samples, strict=False), 1):
            ids, targets, loss_scale = sample
            end = start + len(ids)
            if loss_scale is not None:
                weights["loss_scale"][start : end - 1] = loss_scale[1:]
            input_ids[start:end] = ids
            labels[start : end - 1] = targets[1:]
            numbers[start:end] = number
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(total + padding) - np.repeat(starts, lengths)
        return {
            "input_ids": torch.from_numpy(input_ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "samples": torch.from_numpy(numbers)[None],
            "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
            "max_seqlen": torch.tensor(max(lengths), dtype=torch.int32),
            **{name: torch.from_numpy(array)[None] for name, array in weights.items()},
        }

    def _padded(self, samples: list[Sample]) -> dict[str, Tensor]:
        width = self._padded_length(max(len(ids) for ids, *_ in samples))
        input_ids = np.full((len(samples), width), self.pad_token_id)
        labels = np.full((len(samples), width), IGNORE)
        numbers = np.zeros((len(samples), width), dtype=np.int64)
        weights = _weights_like(labels, samples)
        for index, (ids, targets, loss_scale) in enumerate(samples):
            if loss_scale is not None:
                weights["loss_scale"][index, : len(ids) - 1] = loss_scale[1:]
            input_ids[index, : len(ids)] = ids
            labels[index, : len(ids) - 1] = targets[1:]
            numbers[index, : len(ids)] = index + 1
        positions = torch.arange(width).repeat(len(samples), 1)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": positions,
            "samples": torch.from_numpy(numbers),
            **{name: torch.from_numpy(array) for name, array in weights.items()},
        }

    def _weights(self, labels: Tensor, samples: Tensor) -> Tensor:
        trained = labels != IGNORE
        if self.sample_weight is None:
            return trained.float()
        counts = torch.bincount(samples[trained], minlength=int(samples.max()) + 1)
        return trained * (self.sample_weight / counts.clamp(min=1))[samples]

    def _padded_length(self, length: int) -> int:
        if self.fixed_length is not None:
            if length > self.fixed_length:
                raise UserError(
                    f"a micro-batch of {length} tokens is longer than the fixed length "
                    f"{self.fixed_length}: lower --max_length or --micro_batch_size"
                )
            return self.fixed_length
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of


def _flattened(rows: Iterable[Any]) -> Iterable[dict[str, Any]]:
    """Yield rows, and those in packs and in pairs."""
    for row in rows:
        if isinstance(row, list):
            yield from _flattened(row)
        elif "input_ids" not in row:
            yield from _flattened(row.values())
        else:
            yield row


def _reference(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A reference's log-probabilities where rows have them; rows that fill up have none."""
    if not any("ref_logps" in row for row in rows):
        return {}
    return {"ref_logps": torch.tensor([float(row.get("ref_logps", 0.0)) for row in rows])}


def _weights_like(labels: Array, samples: list[Sample]) -> dict[str, Array]:
    """Weights of 1 where a sample has weights: rows that fill up an evaluation have none."""
    if all(loss_scale is None for *_, loss_scale in samples):
        return {}
    return {"loss_scale": np.ones(labels.shape, dtype=np.float32)}


def untrained(item: Any) -> Any:
    """A row of one token that is not trained, in place of a row or of a pack of rows."""
    row = item[0] if isinstance(item, list) else item
    return {"input_ids": row["input_ids"][:1], "labels": [IGNORE], "length": 1}
