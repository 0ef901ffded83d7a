"""Training data that are read while training."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from swiftmeg import distributed
from swiftmeg.data.stream_loader import StreamLoader, StreamPosition, stream_key
from swiftmeg.data.template import Template
from swiftmeg.errors import UserError
from swiftmeg.trainers.data import TrainingData

logger = logging.getLogger(__name__)


@dataclass
class StreamedData(TrainingData):
    """`train` is a RowStream. Checkpoints keep its position, in Megatron's namespace."""

    template: Template
    _saved: dict[str, Any] | None = None
    _loader: StreamLoader | None = None

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
        self._loader = StreamLoader(
            self.train,
            self.template.encode,
            self.collate,
            strict=self.args.strict,
            pack_length=self.longest if self.args.packing else None,
            start=start,
            **shared,
        )
        return self._loader

    def resume(self, saved: Any) -> None:
        self._saved = getattr(saved, "stream_position", None)

    def before_save(self, megatron: Any) -> None:
        import torch
        from megatron.core import mpu

        if self._loader is None:
            return
        group = mpu.get_data_parallel_group()
        positions: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(positions, self._loader.position, group=group)
        whole = StreamPosition()
        if self._saved is not None and megatron.consumed_train_samples:
            whole.drops.merge(StreamPosition.from_json(self._saved).drops)
        for position in positions:
            whole.merge(position)
        megatron.stream_position = {"key": self._key(), **whole.to_json()}
        if distributed.on_rank_zero() and whole.drops.total:
            logger.info("rows of the stream dropped so far: %d: %s", whole.drops.total, whole.drops)

    def _key(self) -> str:
        return stream_key(self.train, [self.template.identity(), self.args.packing])
