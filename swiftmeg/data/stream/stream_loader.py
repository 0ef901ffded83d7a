"""Micro-batches of a stream, and the position that a checkpoint keeps."""

import dataclasses
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from swiftmeg.cache import content_key
from swiftmeg.data.loader import Batch, BatchSplit, Collate
from swiftmeg.data.standard_row import Drops
from swiftmeg.data.stream.lanes import Dealer, Encode, Lane, Position, Sample
from swiftmeg.data.stream.stream import RowStream
from swiftmeg.errors import UserError


@dataclass
class StreamPosition:
    """How far a stream has been read: the positions of lanes, how many global batches were made of
    what follows them at the end of the stream, and what was dropped so far."""

    lanes: dict[int, Position] = field(default_factory=dict)
    drops: Drops = field(default_factory=Drops)
    tail: int = 0

    def add(self, lane: int, sample: Sample) -> None:
        """Go on behind a sample of `lane`."""
        self.lanes[lane] = sample.position
        self.drops.merge(sample.drops)

    def merge(self, other: "StreamPosition") -> None:
        """Take over the lanes of another rank."""
        self.lanes.update(other.lanes)
        self.drops.merge(other.drops)
        self.tail = max(self.tail, other.tail)

    def to_json(self) -> dict[str, Any]:
        return {
            "lanes": {
                str(lane): dataclasses.asdict(self.lanes[lane]) for lane in sorted(self.lanes)
            },
            "drops": self.drops.to_json(),
            "tail": self.tail,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StreamPosition":
        lanes = {int(lane): Position(**position) for lane, position in value["lanes"].items()}
        return cls(lanes, Drops.from_json(value["drops"]), value.get("tail", 0))


@dataclass
class Rest:
    """What is left of a stream in some lanes when others have ended: their samples, what is dropped
    on the way, and the place behind the last row."""

    samples: dict[int, list[Any]] = field(default_factory=dict)
    drops: Drops = field(default_factory=Drops)
    end: int | None = None

    def add(self, lane: int, sample: Sample) -> None:
        """Add a sample of `lane`."""
        self.samples.setdefault(lane, []).append(sample.content)
        self.drops.merge(sample.drops)

    def merge(self, other: "Rest") -> None:
        """Add what other lanes have, or the same lanes behind these samples."""
        for lane, samples in other.samples.items():
            self.samples.setdefault(lane, []).extend(samples)
        self.drops.merge(other.drops)
        self.end = other.end if self.end is None else self.end

    def in_turns(self) -> list[Any]:
        """The first samples of all lanes, in order of lanes, then the second ones, and so on."""
        lanes = [self.samples[lane] for lane in sorted(self.samples)]
        return [each for turn in zip_longest(*lanes) for each in turn if each is not None]


class StreamLoader:
    """Training micro-batches of one data-parallel rank, read from `stream`, for ever.

    After `epochs` it has an end (None: it has not), which `has_step` sees coming. Lanes end at
    different times: `rest` is what is left then, and `deal` makes global batches of that of all
    ranks, so that less than one is left out in the end.

    Lane i of `global_batch_size` gives sample i of every global batch, whatever the layout; see
    `lanes`. Iteration begins at `start`, a position of all lanes (None: at the beginning), and
    `position` follows the batches that were handed out, for the lanes of this rank alone.
    `pack_length` packs rows into samples of at most that many tokens.

    A micro-batch always comes from the same worker process as the same one of the step before, so
    the number of workers is the largest divisor of a step's micro-batches up to `num_workers`.

    Raises UserError if the sizes do not fit together, and during iteration for unusable data.
    """

    def __init__(
        self,
        stream: RowStream,
        encode: Encode,
        collate: Collate,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int = 0,
        strict: bool = False,
        pack_length: int | None = None,
        start: StreamPosition | None = None,
        epochs: int | None = None,
    ) -> None:
        layout = BatchSplit(micro_batch_size, global_batch_size, dp_rank, dp_size)
        batches = list(layout.micro_batches(0))
        start = start or StreamPosition()
        if start.lanes and sorted(start.lanes) != list(range(global_batch_size)):
            raise UserError(
                f"--global_batch_size {global_batch_size}: the checkpoint's stream was dealt out "
                f"for {len(start.lanes)}: resume with the global batch size of that run"
            )
        self.position = StreamPosition(tail=start.tail)
        for lane in (lane for batch in batches for lane in batch):
            self.position.lanes[lane] = start.lanes.get(lane, Position())
        workers = max((n for n in range(1, num_workers + 1) if len(batches) % n == 0), default=0)
        dataset = _MicroBatches(
            *(stream, encode, collate, batches, self.position, strict, pack_length),
            *(global_batch_size, epochs),
        )
        self._collate = collate
        self._batches = batches
        self._epochs = epochs
        self._lanes = global_batch_size
        self._done = start.tail
        self._items: Iterator[Any] | None = None
        self._ahead: deque[tuple[Batch, list[tuple[int, Sample]], int]] = deque()
        self._rest, self._rests = Rest(), 0
        self._processes = max(workers, 1)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            # Functions of plug-ins, which preprocess rows, need not pickle.
            multiprocessing_context="fork" if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while not self._ahead:
            if self._rests:
                raise StopIteration
            self._read_ahead()
        batch, samples, tail = self._ahead.popleft()
        for lane, sample in samples:
            self.position.add(lane, sample)
        self.position.tail = tail
        return batch

    def has_step(self) -> bool:
        """Whether there is this rank's part of another global batch; reads it ahead.

        Asked between steps. Another rank may have less.
        """
        while len(self._ahead) < len(self._batches) and not self._rests:
            self._read_ahead()
        return len(self._ahead) >= len(self._batches)

    def rest(self) -> Rest:
        """What this rank has when some rank has no other step; reads the stream to its end."""
        while self._rests < self._processes:
            self._read_ahead()
        rest = Rest()
        for _, samples, _ in self._ahead:
            for lane, sample in samples:
                rest.add(lane, sample)
        self._ahead.clear()
        rest.merge(self._rest)
        self._rest = rest
        return rest

    def deal(self, rest: Rest) -> int:
        """Go on with what all ranks have left; returns how many samples fill no global batch."""
        samples = rest.in_turns()
        steps, left = divmod(len(samples), self._lanes)
        for step in range(self._done, steps):
            for batch in self._batches:
                chosen = [samples[step * self._lanes + place] for place in batch]
                self._ahead.append((self._collate(chosen), [], step + 1))
        return left

    def finish(self) -> None:
        """Stand at the end of the stream, where more epochs would begin."""
        if (end := self._rest.end) is not None and self._epochs is not None:
            position = Position(end, epoch=self._epochs, start=end)
            self.position.lanes = dict.fromkeys(self.position.lanes, position)
        self.position.drops.merge(self._rest.drops)
        self.position.tail = 0

    def _read_ahead(self) -> None:
        """Take the next micro-batch, or the rest of a process, which is its last item."""
        if self._items is None:
            self._items = iter(self._loader)
        item = next(self._items)
        if isinstance(item, UserError):
            raise item
        if isinstance(item, Rest):
            self._rest.merge(item)
            self._rests += 1
        else:
            self._ahead.append((*item, 0))


class _MicroBatches(IterableDataset[Any]):
    """Pairs of a micro-batch and its lanes with their samples.

    A stream that has an end gives its Rest last; one that has none leaves the samples' contents
    out. A UserError is handed on as an item: raised in a worker, it would come with a traceback.
    """

    def __init__(
        self,
        stream: RowStream,
        encode: Encode,
        collate: Collate,
        batches: list[list[int]],
        start: StreamPosition,
        strict: bool,
        pack_length: int | None,
        lanes: int,
        epochs: int | None,
    ) -> None:
        self._stream = stream
        self._encode = encode
        self._collate = collate
        self._batches = batches
        self._start = start
        self._strict = strict
        self._pack_length = pack_length
        self._lanes = lanes
        self._epochs = epochs

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._micro_batches()
        except UserError as error:
            yield error

    def _micro_batches(self) -> Iterator[Any]:
        worker = get_worker_info()
        batches = self._batches[worker.id :: worker.num_workers] if worker else self._batches
        positions = {lane: self._start.lanes[lane] for batch in batches for lane in batch}
        dealer = Dealer(self._stream, self._lanes, positions, self._epochs)
        options: dict[str, Any] = {"strict": self._strict, "pack_length": self._pack_length}
        lanes = {
            lane: Lane(dealer, lane, position, self._encode, **options)
            for lane, position in positions.items()
        }
        while True:
            for batch in batches:
                taken = {lane: lanes[lane].take() for lane in batch}
                samples = {lane: sample for lane, sample in taken.items() if sample is not None}
                if len(samples) < len(batch):
                    yield _rest_of(samples, lanes, dealer.end)
                    return
                collated = self._collate([sample.content for sample in samples.values()])
                if self._epochs is None:
                    samples = {k: dataclasses.replace(s, content=None) for k, s in samples.items()}
                yield collated, list(samples.items())


def _rest_of(samples: dict[int, Sample], lanes: dict[int, Lane], end: int | None) -> Rest:
    """Those samples and all that the lanes still give."""
    rest = Rest(end=end)
    for number, sample in samples.items():
        rest.add(number, sample)
    for number, lane in lanes.items():
        while (left := lane.take()) is not None:
            rest.add(number, left)
        rest.drops.merge(lane.drops)
    return rest


def _as_it_is(item: Any) -> Any:
    return item


def stream_key(stream: RowStream, encoding: Any) -> str:
    """A hash of all that decides which samples a stream gives."""
    return content_key([stream.describe(), encoding])
