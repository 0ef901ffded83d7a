"""Micro-batches of a stream, and the position that a checkpoint keeps."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from swiftmeg.data.lanes import Dealer, Encode, Lane, Position, Sample
from swiftmeg.data.loader import Batch, Collate, Layout
from swiftmeg.data.rows import Drops
from swiftmeg.data.store import content_key
from swiftmeg.data.stream import RowStream
from swiftmeg.errors import UserError


@dataclass
class StreamPosition:
    """How far a stream has been read: the positions of lanes, and what was dropped so far."""

    lanes: dict[int, Position] = field(default_factory=dict)
    drops: Drops = field(default_factory=Drops)

    def add(self, lane: int, sample: Sample) -> None:
        """Go on behind a sample of `lane`."""
        self.lanes[lane] = sample.position
        self.drops.merge(sample.drops)

    def merge(self, other: "StreamPosition") -> None:
        """Take over the lanes of another rank."""
        self.lanes.update(other.lanes)
        self.drops.merge(other.drops)

    def to_json(self) -> dict[str, Any]:
        return {
            "lanes": {
                str(lane): dataclasses.asdict(self.lanes[lane]) for lane in sorted(self.lanes)
            },
            "drops": self.drops.to_json(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StreamPosition":
        lanes = {int(lane): Position(**position) for lane, position in value["lanes"].items()}
        return cls(lanes, Drops.from_json(value["drops"]))


class StreamLoader:
    """Endless training micro-batches of one data-parallel rank, read from `stream`.

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
    ) -> None:
        layout = Layout(micro_batch_size, global_batch_size, dp_rank, dp_size)
        batches = list(layout.micro_batches(0))
        start = start or StreamPosition()
        if start.lanes and sorted(start.lanes) != list(range(global_batch_size)):
            raise UserError(
                f"--global_batch_size {global_batch_size}: the checkpoint's stream was dealt out "
                f"for {len(start.lanes)}: resume with the global batch size of that run"
            )
        self.position = StreamPosition()
        for lane in (lane for batch in batches for lane in batch):
            self.position.lanes[lane] = start.lanes.get(lane, Position())
        workers = max((n for n in range(1, num_workers + 1) if len(batches) % n == 0), default=0)
        dataset = _MicroBatches(
            stream, encode, collate, batches, self.position, strict, pack_length, global_batch_size
        )
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
        for result in self._loader:
            if isinstance(result, UserError):
                raise result
            batch, samples = result
            for lane, sample in samples:
                self.position.add(lane, sample)
            yield batch


class _MicroBatches(IterableDataset[Any]):
    """Pairs of a micro-batch and its lanes with their samples, whose contents are left out.

    A UserError is handed on as an item: raised in a worker, it would come with a traceback.
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
    ) -> None:
        self._stream = stream
        self._encode = encode
        self._collate = collate
        self._batches = batches
        self._start = start
        self._strict = strict
        self._pack_length = pack_length
        self._lanes = lanes

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._micro_batches()
        except UserError as error:
            yield error

    def _micro_batches(self) -> Iterator[Any]:
        worker = get_worker_info()
        batches = self._batches[worker.id :: worker.num_workers] if worker else self._batches
        positions = {lane: self._start.lanes[lane] for batch in batches for lane in batch}
        dealer = Dealer(self._stream, self._lanes, positions)
        options: dict[str, Any] = {"strict": self._strict, "pack_length": self._pack_length}
        lanes = {
            lane: Lane(dealer, lane, position, self._encode, **options)
            for lane, position in positions.items()
        }
        while True:
            for batch in batches:
                samples = [(lane, lanes[lane].take()) for lane in batch]
                collated = self._collate([sample.content for _, sample in samples])
                yield (
                    collated,
                    [(lane, dataclasses.replace(s, content=None)) for lane, s in samples],
                )


def _as_it_is(item: Any) -> Any:
    return item


def stream_key(stream: RowStream, encoding: Any) -> str:
    """A hash of all that decides which samples a stream gives."""
    return content_key([stream.describe(), encoding])
