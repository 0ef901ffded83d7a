"""Map a function over chunks of work in processes, keeping order and a bounded backlog."""

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from swiftmeg.orphans import die_with

_work: Callable[..., object] | None = None


def _start(work: Callable[..., object], parent: int) -> None:
    global _work
    _work = work
    gc.freeze()  # collections need not look through all that was imported, nor copy its pages
    # Orphans would wait for work for ever, and hold the locks that their parent held.
    die_with(parent)
    # The parallelism is over chunks; threads of a forked tokenizer would only compete with it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _call(chunk: object) -> object:
    assert _work is not None
    return _work(chunk)


def map_chunks[Chunk, Result](
    work: Callable[[Chunk], Result],
    chunks: Iterable[Chunk],
    num_proc: int = 1,
    in_process: bool = True,
) -> Iterator[Result]:
    """Yield `work(chunk)` for each chunk in order, with `num_proc` processes.

    A single one is this process, unless `in_process` is false.

    Workers are forked, so `work` need not be picklable; chunks and results must be. At most two
    chunks per process are in flight, so that an endless source does not fill the memory. A worker
    that is killed raises BrokenProcessPool here instead of hanging; workers end with this process.
    """
    if num_proc <= 1 and in_process:
        gc.freeze()
        try:
            yield from map(work, chunks)
        finally:
            gc.unfreeze()
        return
    num_proc = max(num_proc, 1)
    with ProcessPoolExecutor(
        num_proc,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start,
        initargs=(work, os.getpid()),
    ) as pool:
        waiting: deque[Future[object]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_call, chunk))
                if len(waiting) >= 2 * num_proc:
                    yield waiting.popleft().result()  # type: ignore[misc]
            while waiting:
                yield waiting.popleft().result()  # type: ignore[misc]
        finally:
            for future in waiting:
                future.cancel()
