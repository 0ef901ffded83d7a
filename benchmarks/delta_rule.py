"""Measure the gated delta rule of one layer, forward and backward: in chunks and token by token.

    python benchmarks/delta_rule.py --tokens 4096 --samples 1

has the heads of Qwen3-Next-80B-A3B, in float32, on a GPU where there is one. `--walk 0` leaves the
walk over tokens out; a number walks over so many tokens only and scales the time up.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from swiftmeg.models.native.delta_rule import Chunks, gated_delta_rule


def walk(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """One sample, token by token; arguments as of `gated_delta_rule`."""
    state = value.new_zeros(*value.shape[1:3], key.shape[-1], value.shape[-1])
    outputs = []
    for q, k, v, decay, b in zip(query, key, value, log_decay.exp(), beta, strict=True):
        q, k = q[:, None, None], k[:, None, None]
        state = state * decay[..., None, None]
        wrong = v - (k @ state)[:, :, 0]
        state = state + k.mT * (b[..., None] * wrong)[:, :, None]
        outputs.append((q @ state)[:, :, 0])
    return torch.stack(outputs)


def seconds(compute: Callable[[], Tensor], inputs: list[Tensor], repeats: int) -> float:
    """The shortest of `repeats` passes forward and backward, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        for each in inputs:
            each.grad = None
        _wait()
        start = time.perf_counter()
        compute().sum().backward()
        _wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of all samples together")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--groups", type=int, default=16, help="key heads")
    parser.add_argument("--heads", type=int, default=2, help="value heads of each")
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--walk", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = (args.tokens, args.groups)
    query, key = torch.nn.functional.normalize(
        torch.randn(2, *shape, args.size, device=device), dim=-1
    )
    value = torch.randn(*shape, args.heads, args.size, device=device)
    log_decay = -torch.rand(*shape, args.heads, device=device)
    beta = torch.rand(*shape, args.heads, device=device)
    inputs = [each.requires_grad_() for each in (query, key, value, log_decay, beta)]
    chunks = Chunks([args.tokens // args.samples] * args.samples, device)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    fast = seconds(lambda: gated_delta_rule(*inputs, chunks), inputs, args.repeats)
    line = f"{device.type}: {args.tokens} tokens in {args.samples} samples: {fast * 1e3:.1f} ms"
    if torch.cuda.is_available():
        line += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    print(line + " in chunks")
    if count := min(args.walk, args.tokens):
        few = [each.detach()[:count].clone().requires_grad_() for each in inputs]
        slow = seconds(lambda: walk(*few), few, 1) * args.tokens / count
        print(f"{device.type}: {slow * 1e3:.1f} ms token by token: {slow / fast:.1f} times as long")


if __name__ == "__main__":
    main()
