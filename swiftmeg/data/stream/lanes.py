"""The stream dealt out to lanes, one for each place in the global batch.

Each stretch of as many rows as there are lanes is dealt out, one row a lane. A lane drops
what it cannot use, packs what is left, and puts one sample into every global batch. So the samples
of a global batch depend neither on the number of ranks nor on how they divide the lanes, each rank
parses only the rows of its lanes, and a lane's position is a few numbers.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from swiftmeg.data.encoded.packing import pack, tokens_of
from swiftmeg.data.standard_row import Drops, Row, RowError, RowTooLong
from swiftmeg.data.stream.stream import RowStream, StreamRow
from swiftmeg.errors import UserError

WINDOW = 32
"""Packs that a lane fills together."""

Encoded = dict[str, Any]
Encode = Callable[[Row], Encoded]


@dataclass
class Position:
    """Where a lane is: it makes samples of the rows at `held` and from place `at` on, and has
    handed out the first `taken` of them. These rows begin in epoch `epoch`, whose first row is at
    `start`."""

    at: int = 0
    held: list[int] = field(default_factory=list)
    taken: int = 0
    epoch: int = 0
    start: int = 0

    def first(self) -> int:
        """The first place of the stream that is needed to go on from here."""
        return min([self.at, *self.held])


@dataclass
class Sample:
    """One sample, and its lane's position behind it. `drops` are what was dropped on the way."""

    content: Any
    position: Position
    drops: Drops


@dataclass(frozen=True)
class Dealt:
    """A row of the stream for one lane: its place, and its epoch and where that starts."""

    place: int
    epoch: int
    start: int
    row: StreamRow

    @property
    def origin(self) -> str:
        file, (number, _) = self.row[1]
        return f"{file}:{number}"


def owner(place: int, lanes: int) -> int:
    """The lane that the row at `place` is dealt to.

    Each stretch begins with another lane: otherwise, where long rows come at even distances, some
    lanes would need more rows than others for ever.
    """
    return (place + (place // lanes * 0x9E3779B1 >> 16)) % lanes


class Dealer:
    """Walks through the stream and hands the rows of the given lanes to them.

    `positions` are the lanes' own, of `lanes` in all. The stream ends after `epochs` (None: never).
    Raises UserError where an epoch and more holds nothing usable.
    """

    def __init__(
        self,
        stream: RowStream,
        lanes: int,
        positions: dict[int, Position],
        epochs: int | None = None,
    ) -> None:
        self._stream = stream
        self._lanes = lanes
        self.epochs = epochs
        self.end: int | None = None
        """The place behind the last row, once it is known."""
        self._first = {lane: position.first() for lane, position in positions.items()}
        self._queues: dict[int, deque[Dealt]] = {lane: deque() for lane in positions}
        earliest = min(positions.values(), key=lambda position: position.epoch)
        self._rows = self._walk(earliest.epoch, earliest.start)
        self._epoch_rows: int | None = None
        self._unusable = 0

    def next(self, lane: int) -> Dealt | None:
        """Return the lane's next row; None where the stream has ended."""
        queue = self._queues[lane]
        while not queue:
            dealt = next(self._rows, None)
            if dealt is None:
                return None
            wanted_by = owner(dealt.place, self._lanes)
            if dealt.place >= self._first.get(wanted_by, dealt.place + 1):
                self._queues[wanted_by].append(dealt)
        return queue.popleft()

    def put_back(self, lane: int, dealt: Dealt) -> None:
        """Let `dealt` be the lane's next row."""
        self._queues[lane].appendleft(dealt)

    def standard(self, dealt: Dealt) -> Row:
        """Return the row in standard form; raises RowError."""
        return self._stream.standard(dealt.row)

    def count(self, usable: bool) -> None:
        """Stop where nothing can be used, instead of reading the same rows for ever."""
        self._unusable = 0 if usable else self._unusable + 1
        if self._epoch_rows is not None and self._unusable > 1000 + 2 * self._epoch_rows:
            raise UserError(f"--streaming true: the last {self._unusable} rows could not be used")

    def _walk(self, epoch: int, start: int) -> Iterator[Dealt]:
        while self.epochs is None or epoch < self.epochs:
            place = start
            for row in self._stream.epoch(epoch):
                yield Dealt(place, epoch, start, row)
                place += 1
            self._epoch_rows = place - start
            if not self._epoch_rows:
                raise UserError("--dataset: no rows")
            epoch, start = epoch + 1, place
        self.end = start


class Lane:
    """The samples of one lane, from a position on.

    With `pack_length` a sample is a list of encoded rows of at most that many tokens, of windows of
    `WINDOW` packs. The emptiest pack of a window goes back into the next one, once. Where the
    stream has an end, a window ends with its epoch and holds nothing back then: its packs are the
    same in a run of more epochs.
    """

    def __init__(
        self,
        dealer: Dealer,
        lane: int,
        position: Position,
        encode: Encode,
        *,
        strict: bool = False,
        pack_length: int | None = None,
    ) -> None:
        self._dealer = dealer
        self._lane = lane
        self._encode = encode
        self._strict = strict
        self._pack_length = pack_length
        self._position = position
        self._next = position
        self._kept: dict[int, tuple[Dealt, Encoded]] = {}
        self.drops = Drops()
        """What was dropped since the last sample."""
        self._ready: deque[Any] = deque()
        if position.taken:
            self._fill()
            self.drops = Drops()  # they were reported with the first of these samples
            for _ in range(position.taken):
                self._ready.popleft()

    def take(self) -> Sample | None:
        """Return the next sample; None where the stream has ended."""
        if not self._ready:
            self._position = self._next
            self._fill()
        if not self._ready:
            return None
        content = self._ready.popleft()
        self._position = replace(self._position, taken=self._position.taken + 1)
        position = self._position if self._ready else self._next
        drops, self.drops = self.drops, Drops()
        return Sample(content, position, drops)

    def _fill(self) -> None:
        """Make the samples that begin at the position, and find where the next ones begin."""
        if self._pack_length is None:
            if (usable := self._usable_row()) is not None:
                self._ready.append(usable[1])
                self._next = _behind(usable[0])
            return
        rows = dict(self._kept)
        tokens = sum(tokens_of(row) for _, row in rows.values())
        ended = False
        while tokens < WINDOW * self._pack_length:
            epoch = next(iter(rows.values()))[0].epoch if rows else None
            usable = self._usable_row(None if self._dealer.epochs is None else epoch)
            if ended := usable is None:
                break
            rows[usable[0].place] = usable
            tokens += tokens_of(usable[1])
        if not rows:
            return
        places = sorted(rows)
        items = [rows[place][1] for place in places]
        lengths = [tokens_of(item) for item in items]
        packs = pack(lengths, self._pack_length, pairs="input_ids" not in items[0])
        emptiest = min(range(len(packs)), key=lambda n: sum(lengths[i] for i in packs[n]))
        held = [places[i] for i in packs[emptiest]]
        if len(packs) > 1 and not ended and not set(held) & set(self._position.held):
            packs.pop(emptiest)
        else:
            held = []
        self._ready.extend([items[i] for i in group] for group in packs)
        self._kept = {place: rows[place] for place in held}
        self._next = _behind(rows[places[-1]][0])
        if held:
            first = rows[held[0]][0]
            self._next = replace(self._next, held=held, epoch=first.epoch, start=first.start)

    def _usable_row(self, epoch: int | None = None) -> tuple[Dealt, Encoded] | None:
        """The next row and its place; None at the end of `epoch`, or of the stream."""
        while (dealt := self._dealer.next(self._lane)) is not None:
            if epoch is not None and dealt.epoch != epoch:
                self._dealer.put_back(self._lane, dealt)
                return None
            if dealt.place < self._position.at and dealt.place not in self._position.held:
                continue
            try:
                encoded = self._encode(self._dealer.standard(dealt))
            except RowError as error:
                if self._strict and not isinstance(error, RowTooLong):
                    raise UserError(f"--strict true: {dealt.origin}: {error}") from None
                self.drops.add(dealt.origin, error)
                self._dealer.count(usable=False)
            else:
                self._dealer.count(usable=True)
                return dealt, encoded
        return None


def _behind(dealt: Dealt) -> Position:
    return Position(dealt.place + 1, epoch=dealt.epoch, start=dealt.start)
