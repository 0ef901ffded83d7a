"""What a run shows and keeps of its numbers: console lines and logging.jsonl."""

import json
import re
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor

from swiftmeg.observer import Observer, Step
from swiftmeg.trainers.losses import step_losses

_PERPLEXITY = re.compile(r" (?!lm loss)[\w/ ]+ PPL: \S+ \|")
"""What Megatron prints as the perplexity of every number of an evaluation."""


class TokenCounter:
    """Counts the tokens, padding left out, that this rank's micro-batches bring."""

    def __init__(self) -> None:
        self.tokens = 0

    def counted(self, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The same micro-batches, each counted as it is taken."""
        for batch in batches:
            self.tokens += int(batch["num_tokens"])
            yield batch

    def take(self) -> int:
        """Tokens since the last call, summed over data-parallel ranks; collective."""
        count = torch.tensor([self.tokens], dtype=torch.float64, device=torch.cuda.current_device())
        self.tokens = 0
        torch.distributed.all_reduce(count, group=mpu.get_data_parallel_group())
        return int(count.item())


def peak_memory_gib() -> float:
    """Peak memory of this process: the GPU's allocator, or the resident set without a GPU."""
    peak = torch.cuda.max_memory_reserved()
    if peak:
        return peak / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunLog(Observer):
    """Collects what Megatron logs; the last rank prints it and writes logging.jsonl.

    Losses are means of the steps since the previous multiple of --log_interval, as on Megatron's
    own lines.
    """

    def __init__(self, folder: Path, args: Any, counter: TokenCounter) -> None:
        self.file = folder / "logging.jsonl"
        self.args = args
        self.counter = counter
        self.is_writer = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        self.start = self.last = time.monotonic()
        self.first_iteration: int | None = None
        self.last_iteration = 0
        self.sums: dict[str, float] = {}
        self.steps = 0
        self.suffix = ""

    def after_step(self, step: Step) -> None:
        iteration = step.iteration
        if self.first_iteration is None:
            self.first_iteration = self.last_iteration = iteration - 1
        losses = step.losses | step_losses(self.args)
        if not step.skipped:
            self.steps += 1
            for key, value in losses.items():
                self.sums[key] = self.sums.get(key, 0.0) + float(value)
        if not (step.is_first or iteration % self.args.log_interval == 0):
            return
        tokens = self.counter.take()
        now = time.monotonic()
        done = iteration - self.first_iteration
        elapsed = now - self.start
        remaining = elapsed / done * (self.args.train_iters - iteration)
        per_second = tokens / max(now - self.last, 1e-9)
        memory = peak_memory_gib()
        seconds = (now - self.last) / max(iteration - self.last_iteration, 1)
        record: dict[str, Any] = {k: total / max(self.steps, 1) for k, total in self.sums.items()}
        record["grad_norm"] = step.grad_norm
        if step.params_norm is not None:
            record["params_norm"] = step.params_norm
        record |= {
            "learning_rate": step.learning_rate,
            "elapsed_time_per_iteration": seconds,
            "tokens_per_second": per_second,
            "memory(GiB)": memory,
            "elapsed_time": str(timedelta(seconds=round(elapsed))),
            "remaining_time": str(timedelta(seconds=round(remaining))),
            "loss_scale": step.loss_scale,
            "consumed_samples": self.args.consumed_train_samples,
            "global_step/max_steps": f"{iteration}/{self.args.train_iters}",
        }
        self.suffix = (
            f" tokens/s: {per_second:.0f} | memory(GiB): {memory:.2f} |"
            f" elapsed time: {record['elapsed_time']} |"
            f" remaining time: {record['remaining_time']} |"
        )
        self._write(record)
        if not step.is_first:
            self.sums, self.steps = {}, 0
        self.last, self.last_iteration = now, iteration

    def evaluated(self, iteration: int, losses: dict[str, float]) -> None:
        if losses:
            record: dict[str, Any] = {f"eval_{key}": value for key, value in losses.items()}
            record["global_step/max_steps"] = f"{iteration}/{self.args.train_iters}"
            self._write(record)
        self.last = time.monotonic()  # the time it took counts for no training step

    def line(self, text: str) -> str:
        text = _PERPLEXITY.sub("", text)
        if " iteration " not in text or "consumed samples" not in text:
            return text
        own, self.suffix = self.suffix, ""
        return text + own

    def _write(self, record: dict[str, Any]) -> None:
        if not self.is_writer:
            return
        rounded = {k: round(v, 8) if isinstance(v, float) else v for k, v in record.items()}
        with self.file.open("a") as file:
            file.write(json.dumps(rounded) + "\n")
