"""Which rows each data-parallel rank sees, and when.

The order of rows is fixed by the seed alone. Training reads an endless stream: the permutation of
epoch 0, then that of epoch 1, and so on, each over the whole dataset. Global batch g is
`stream[g * global_batch_size : (g + 1) * global_batch_size]`; inside it, micro-batch m of rank r
takes the `micro_batch_size` rows from `(m * dp_size + r) * micro_batch_size` on. So neither the
layout nor an interruption changes which rows a step trains on.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from swiftmeg.data.collate import untrained
from swiftmeg.errors import UserError

Batch = Any
Collate = Callable[[Sequence[Any]], Batch]


class BatchSplit:
    """How a global batch is shared out; raises UserError if the sizes do not fit."""

    def __init__(self, micro_batch_size: int, global_batch_size: int, dp_rank: int, dp_size: int):
        if micro_batch_size < 1 or global_batch_size < 1:
            raise UserError(
                f"--micro_batch_size {micro_batch_size} and --global_batch_size "
                f"{global_batch_size}: both must be at least 1"
            )
        step = micro_batch_size * dp_size
        if global_batch_size % step:
            raise UserError(
                f"--global_batch_size {global_batch_size}: must be a multiple of "
                f"--micro_batch_size {micro_batch_size} times the data-parallel size {dp_size} "
                f"(= {step})"
            )
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.dp_rank = dp_rank
        self.step = step

    def micro_batches(self, start: int) -> Iterator[list[int]]:
        """Yield this rank's stream positions of the global batch that begins at `start`."""
        first = start + self.dp_rank * self.micro_batch_size
        for begin in range(first, start + self.global_batch_size, self.step):
            yield list(range(begin, begin + self.micro_batch_size))


class _TrainSampler(Sampler[list[int]]):
    def __init__(
        self, rows: int, layout: BatchSplit, consumed_samples: int, seed: int, shuffle: bool
    ) -> None:
        self._rows = rows
        self._layout = layout
        self._consumed = consumed_samples
        self._seed = seed
        self._shuffle = shuffle

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        start = self._consumed
        while True:
            for positions in self._layout.micro_batches(start):
                indices = []
                for position in positions:
                    if position // self._rows != epoch:
                        epoch = position // self._rows
                        order = self._permutation(epoch)
                    indices.append(int(order[position % self._rows]))
                yield indices
            start += self._layout.global_batch_size

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not self._shuffle:
            return np.arange(self._rows)
        return np.random.default_rng([self._seed, epoch]).permutation(self._rows)


class BatchLoader:
    """Endless training micro-batches of one data-parallel rank.

    `dataset` has `len()` and integer indexing; `collate` makes a micro-batch of a list of its
    items. Iteration begins `consumed_samples` rows into the stream, which must be a multiple of
    `global_batch_size`; with `shuffle=False` every epoch runs through the dataset in order.

    Raises UserError if the dataset is empty or the sizes do not fit together.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
        seed: int = 42,
        shuffle: bool = True,
        num_workers: int = 0,
    ) -> None:
        layout = BatchSplit(micro_batch_size, global_batch_size, dp_rank, dp_size)
        if len(dataset) == 0:
            raise UserError("the training dataset is empty: check --dataset")
        if consumed_samples % global_batch_size:
            raise UserError(
                f"--global_batch_size {global_batch_size}: the checkpoint was saved after "
                f"{consumed_samples} samples, which is not a multiple of it: resume with the "
                "global batch size that the run began with"
            )
        sampler = _TrainSampler(len(dataset), layout, consumed_samples, seed, shuffle)
        self._loader = _data_loader(dataset, collate, sampler, num_workers)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


class _EvalSampler(Sampler[list[int]]):
    def __init__(self, rows: int, layout: BatchSplit) -> None:
        self._rows = rows
        self._layout = layout

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self._rows, self._layout.global_batch_size):
            yield from self._layout.micro_batches(start)


class _WithFiller(Dataset[Any]):
    """`dataset`, followed by as many items made by `filler` as are asked for."""

    def __init__(self, dataset: Any, filler: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._filler = filler

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        if index < len(self._dataset):
            return self._dataset[index]
        return self._filler(self._dataset[0])


class EvalLoader:
    """One evaluation's micro-batches of one data-parallel rank; iterate again for the next.

    Rows come in order, each exactly once over all ranks, in `eval_iters(len(dataset),
    global_batch_size)` global batches on every rank alike. The last global batch is filled up
    with what `filler` makes of the first item, which must weigh nothing in the objective.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int = 0,
        filler: Callable[[Any], Any] = untrained,
    ) -> None:
        layout = BatchSplit(micro_batch_size, global_batch_size, dp_rank, dp_size)
        sampler = _EvalSampler(len(dataset), layout)
        filled = _WithFiller(dataset, filler)
        self._loader = _data_loader(filled, collate, sampler, num_workers)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    def repeat(self) -> Iterator[Batch]:
        """Yield the micro-batches of one evaluation after another, for ever."""
        while True:
            yield from self


def _data_loader(
    dataset: Any, collate: Collate, sampler: Sampler[list[int]], num_workers: int
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        # Its own, because making an iterator draws from it: the random state of a continued run
        # would be one draw ahead.
        generator=torch.Generator(),
        # Starting workers anew costs seconds in every evaluation.
        persistent_workers=num_workers > 0,
    )


def train_iters(n_rows: int, max_epochs: int, global_batch_size: int) -> int:
    """Return how many steps `max_epochs` epochs of `n_rows` rows (or packs) are.

    The rows of all epochs are counted together, so only the very last incomplete global batch is
    left out. Raises UserError if there is not one step.
    """
    iters = n_rows * max_epochs // global_batch_size
    if iters < 1:
        raise UserError(
            f"--max_epochs {max_epochs}: {n_rows} rows (packs, with --packing) are less than one "
            f"--global_batch_size {global_batch_size}: lower it, raise --max_epochs, or add data"
        )
    return iters


def eval_iters(n_rows: int, global_batch_size: int) -> int:
    """Return how many global batches hold `n_rows` rows, the last one perhaps partly filler."""
    return -(-n_rows // global_batch_size)
