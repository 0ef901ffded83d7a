"""Training data that are read while training."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from swiftmeg import distributed
from swiftmeg.data.stream.stream_loader import Rest, StreamLoader, StreamPosition, stream_key
from swiftmeg.data.template.pairs import PairTemplate
from swiftmeg.data.template.template import Template
from swiftmeg.errors import UserError
from swiftmeg.trainers.training_data import TrainingData

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StreamedData(TrainingData):
    """`train` is a RowStream. Checkpoints keep its position, in Megatron's namespace."""

    template: Template | PairTemplate
    pack_length: int | None
    """Tokens of a pack, if rows are packed."""
    _saved: dict[str, Any] | None = None
    _loaders: list[StreamLoader] = field(default_factory=list)
    """One for each part of the model on this rank; all give the same."""
    _left_out: int | None = None
    """Samples that fill no global batch, once the first lane has ended."""
    _dropped: str = "none"

    def batches(self, megatron: Any, shared: dict[str, Any]) -> Iterable[Any]:
        saved, start = self._saved, None
        if megatron.consumed_train_samples:
            if saved is None:
                raise UserError(
                    "--streaming true: the checkpoint's run did not read a stream: drop it, or "
                    "begin anew with --finetune true"
                )
            if saved["key"] != self._key():
                raise UserError(
                    "--streaming true: the checkpoint's run read other data, or read it otherwise: "
                    "give the same data flags, or begin anew with --finetune true"
                )
            start = StreamPosition.from_json(saved)
            if start.tail and saved["max_epochs"] != self.args.max_epochs:
                raise UserError(
                    f"--max_epochs {self.args.max_epochs}: the checkpoint was saved among the last "
                    f"steps of a stream of {saved['max_epochs']}: continue with that, then with "
                    "more"
                )
        loader = StreamLoader(
            self.train,
            self.template.encode,
            self.collate,
            strict=self.args.strict,
            pack_length=self.pack_length,
            start=start,
            epochs=self.args.max_epochs,
            **shared,
        )
        self._loaders.append(loader)
        self._left_out = None
        if not self._has_step():
            self._nothing_to_do(megatron)
        return loader

    def after_step(self, megatron: Any, iteration: int) -> None:
        if iteration >= megatron.train_iters or self._has_step():
            return
        limit, megatron.train_iters = megatron.train_iters, iteration
        if distributed.on_rank_zero():
            logger.info(
                "--max_epochs %d: the stream ends at step %d of at most %d; %d samples that fill "
                "no global batch are left out",
                *(self.args.max_epochs, iteration, limit, self._left_out),
            )

    def _has_step(self) -> bool:
        """Whether there is another global batch; collective.

        Where the first lane ends, ranks put together what they have left.
        """
        if self.args.max_epochs is None:
            return True
        if self._left_out is None:
            if _on_every_rank(min([loader.has_step() for loader in self._loaders])):
                return True
            left = [loader.rest() for loader in self._loaders]
            whole = Rest()
            for each in _gather(left[0]):
                whole.merge(each)
            self._dropped = str(whole.drops) or "none"
            for loader in self._loaders:
                self._left_out = loader.deal(whole)
        if self._loaders[0].has_step():
            return True
        for loader in self._loaders:
            loader.finish()
        return False

    def _nothing_to_do(self, megatron: Any) -> None:
        flag = f"--max_epochs {self.args.max_epochs}"
        if not megatron.iteration:
            raise UserError(
                f"{flag}: the stream ends before one --global_batch_size "
                f"{self.args.global_batch_size} is full ({self._left_out} samples; dropped rows: "
                f"{self._dropped}): lower it, raise --max_epochs, or add data"
            )
        megatron.train_iters = megatron.iteration
        if distributed.on_rank_zero():
            print(
                f"warning: {flag}: the stream has ended where the checkpoint was saved: nothing is "
                "left to train; raise --max_epochs, or start anew by --finetune true",
                flush=True,
            )

    def resume(self, saved: Any) -> None:
        self._saved = getattr(saved, "stream_position", None)

    def before_save(self, megatron: Any) -> None:
        if not self._loaders:
            return
        whole = StreamPosition()
        if self._saved is not None and megatron.consumed_train_samples:
            whole.drops.merge(StreamPosition.from_json(self._saved).drops)
        for position in _gather(self._loaders[0].position):
            whole.merge(position)
        megatron.stream_position = {
            "key": self._key(),
            "max_epochs": self.args.max_epochs,
            **whole.to_json(),
        }
        if distributed.on_rank_zero() and whole.drops.total:
            logger.info("rows of the stream dropped so far: %d: %s", whole.drops.total, whole.drops)

    def _key(self) -> str:
        # Where a stream has an end, packs end with epochs.
        packing = self.args.packing and ("by epoch" if self.args.max_epochs else True)
        return stream_key(self.train, [self.template.identity(), packing])


def _on_every_rank(value: bool) -> bool:
    """Whether it holds on all data-parallel ranks."""
    import torch
    from megatron.core import mpu

    holds = torch.tensor(int(value), device=torch.cuda.current_device())
    group = mpu.get_data_parallel_group()
    torch.distributed.all_reduce(holds, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(holds)


def _gather(value: Any) -> list[Any]:
    """The values of all data-parallel ranks."""
    import torch
    from megatron.core import mpu

    group = mpu.get_data_parallel_group()
    values: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values
