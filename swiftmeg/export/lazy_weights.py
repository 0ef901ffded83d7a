"""A model of which only the weights in use have memory, for conversion.

A model that is only converted need not exist as a whole: each weight gets its values when it is
written, and gives its memory back after that. Until then it has none: the system finds memory for
what was allocated when it is first touched.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch

from swiftmeg.export.shards import LiveWeight, gather_shards, live_weights
from swiftmeg.export.write_shares import Share


class Supply(Protocol):
    """Where the values of a model's weights come from."""

    def fill(self, live: LiveWeight) -> None:
        """Write the values of one of this rank's weights into it."""

    @property
    def bytes_read(self) -> int:
        """How much of the source's files this rank has read."""

    def finish(self) -> None:
        """UserError if anything of the source has not been used; collective, after the last."""


@runtime_checkable
class WholeSupply(Supply, Protocol):
    """A source of which one rank can read what the others of a weight's group hold."""

    def shards(self, live: LiveWeight) -> list[torch.Tensor]:
        """All shards of one of this rank's weights, on the CPU, in the order of its group."""


@torch.no_grad()
def fill_all(models: list[Any], supply: Supply) -> None:
    """Fill every weight of this rank; collective."""
    for live in live_weights(models):
        supply.fill(live)
    supply.finish()


def storage_of(tensor: torch.Tensor) -> int:
    """Key of a tensor's storage: equal for its views, and kept while it is resized to 0."""
    return int(tensor.untyped_storage()._cdata)


class OnDemand:
    """The weights of a live model, without memory but for those that are asked for."""

    def __init__(self, models: list[Any], supply: Supply) -> None:
        """`models` are new and hold no values, which `supply` knows."""
        self._supply = supply
        self._weights = {storage_of(live.tensor): live for live in live_weights(models)}
        self._current: int | None = None

    @torch.no_grad()
    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, a weight or part of one, with its values, until another weight is asked for."""
        key = storage_of(tensor)
        if key != self._current:
            self.release()
            live = self._weights[key]
            live.tensor.untyped_storage().resize_(live.tensor.nbytes)
            self._current = key
            self._supply.fill(live)
        return tensor

    @torch.no_grad()
    def shards(self, live: LiveWeight, share: Share) -> list[torch.Tensor]:
        """A weight's shards on the rank that writes it, and none elsewhere.

        That rank reads all of them, where it can; else this is collective, as it is for `Whole`.
        """
        if isinstance(self._supply, WholeSupply):
            self.release()
            return self._supply.shards(live) if share.writes else []
        if not share.gathers:
            return []
        self.values(live.tensor)
        return gather_shards(live, share.receiver)

    def release(self) -> None:
        """Take the memory of the weight in use back."""
        if self._current is not None:
            self._weights[self._current].tensor.untyped_storage().resize_(0)
            self._current = None

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """While weights are asked for one after the other; collective.

        UserError at the end if something was not used.
        """
        try:
            yield
        finally:
            self.release()
        self._supply.finish()


class Whole:
    """The weights of a live model that has its values already."""

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as it is."""
        return tensor

    def shards(self, live: LiveWeight, share: Share) -> list[torch.Tensor]:
        """A weight's shards on the CPU of the rank that writes it, and none elsewhere.

        Collective for the ranks whose share gathers.
        """
        return gather_shards(live, share.receiver) if share.gathers else []

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Nothing to be done."""
        yield


Weights = OnDemand | Whole
