"""Megatron-Core on machines without CUDA: the CPU stands in for the GPU, gloo for NCCL.

Megatron names `cuda` in tensor factories, RNG trackers, streams and asserts. `prepare()` makes
those names mean the CPU in this process, and only where no CUDA device exists; it must run before
`megatron` is imported. Nothing is emulated beyond what a synchronous device needs: streams and
events order nothing (an operation is complete when it returns) and memory counters read zero.
"""

import collections
import contextlib
import logging
import os
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def has_cuda() -> bool:
    """True where a CUDA device can be used."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that holds this process's tensors: its GPU, else the CPU."""
    if has_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return CPU


def backend() -> str:
    """The process-group backend that moves tensors of `device()`."""
    return "nccl" if has_cuda() else "gloo"


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))


class _CudaMeansCpu(TorchFunctionMode):
    """Every `device=cuda` argument, named or positional, becomes the CPU."""

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **(kwargs or {}))


class _Stream(contextlib.nullcontext[Any]):
    """A stream or event on a device where every operation has finished when it returns."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = record = wait = synchronize = _nothing


def _itself(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _type_name(original: Any) -> Any:
    def tensor_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, **kwargs)
        # Under a function mode `original` may come back here, hence the second condition.
        name = original(self)
        return name if "cuda" in name else name.replace("torch.", "torch.cuda.")

    return tensor_type


def _patch_torch() -> None:
    cuda: Any = torch.cuda
    for name in (
        "synchronize",
        "empty_cache",
        "set_device",
        "reset_peak_memory_stats",
        "ipc_collect",
    ):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.memory_stats = lambda *args, **kwargs: collections.defaultdict(int)
    cuda.current_device = lambda: CPU
    # Megatron builds its process groups and seeds its RNG trackers only where devices are counted.
    cuda.device_count = lambda: 1
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_capability = lambda *args, **kwargs: (0, 0)
    cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count()
    )
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: (
        torch.set_rng_state(state)
    )
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    torch.Tensor.cuda = _itself  # type: ignore[method-assign]
    torch.Tensor.pin_memory = _itself  # type: ignore[method-assign]
    torch.Tensor.type = _type_name(torch.Tensor.type)  # type: ignore[method-assign]
    torch.nn.Module.cuda = _itself  # type: ignore[method-assign]
    # The compiler costs more at start-up than the fused kernels give back on a CPU.
    torch._dynamo.config.disable = True


def _patch_distributed() -> None:
    """Gloo takes split sizes as lists of int alone; Megatron's dispatcher hands on arrays."""
    original = torch.distributed.all_to_all_single

    def plain(sizes: Any) -> list[int] | None:
        return None if sizes is None else [int(size) for size in sizes]

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        splits = plain(output_split_sizes), plain(input_split_sizes)
        return original(output, input, *splits, *args, **kwargs)

    torch.distributed.all_to_all_single = all_to_all_single
    _patch_uneven_collectives()


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random

    # Both states are one here, so its warning about a change of the CPU's says nothing.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_uneven_collectives() -> None:
    """Let gathers and scatters have parts of unequal sizes, as NCCL does and gloo does not.

    Experts cut over ranks need them: every rank has another number of tokens.
    """
    from torch import distributed

    gather, scatter = distributed.all_gather, distributed.reduce_scatter
    sum_ = distributed.ReduceOp.SUM

    def is_even(parts: list[torch.Tensor]) -> bool:
        return len({part.shape for part in parts}) == 1

    def all_gather(parts: list[torch.Tensor], tensor: Any, group: Any = None, *rest: Any) -> Any:
        if is_even(parts):
            return gather(parts, tensor, group, *rest)
        parts[distributed.get_rank(group)].copy_(tensor)
        for source, part in enumerate(parts):
            distributed.broadcast(part, group=group, group_src=source)
        return None

    def reduce_scatter(
        output: torch.Tensor, parts: list[torch.Tensor], op: Any = sum_, group: Any = None
    ) -> Any:
        if is_even(parts):
            return scatter(output, parts, op, group)
        for target, part in enumerate(parts):
            whole = part.contiguous().clone()
            distributed.reduce(whole, group=group, group_dst=target)
            if target == distributed.get_rank(group):
                output.copy_(whole)
        return None

    distributed.all_gather = all_gather  # type: ignore[assignment]
    distributed.reduce_scatter = reduce_scatter  # type: ignore[assignment]


_prepared = False


def prepare() -> None:
    """Make Megatron's `cuda` mean the CPU if there is no GPU; does nothing where there is one."""
    global _prepared
    if _prepared or has_cuda():
        return
    _prepared = True
    import torch._dynamo  # noqa: F401  (its config is set below)

    _patch_torch()
    _patch_distributed()
    _CudaMeansCpu().__enter__()
    _patch_megatron()
