"""Time training steps of transformers with its usual best options, as a peer on the same card.

    python benchmarks/transformers_step.py --model bench/qwen2.5-1.5b --length 4096 [--liger]

Weights and Adam's moments are in bf16, without fp32 master weights: less memory and traffic than
ours. SDPA attention, torch's fused AdamW, unpacked rows of `--length` random tokens, no
recomputation. `--liger` puts in liger-kernel's functions. Prints the
median step of those after the fifth, tokens per second and the peak of allocated memory.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--liger", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).cuda()
    model.config.use_cache = False
    if args.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    shape = (args.micro_batch, args.length)
    times = []
    for _ in range(args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(args.micro_batches):
            ids = torch.randint(model.config.vocab_size, shape, device="cuda")
            (model(input_ids=ids, labels=ids).loss / args.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    late = sorted(times[5:])
    median = late[len(late) // 2]
    tokens = args.micro_batch * args.length * args.micro_batches / median
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"transformers{' with liger-kernel' if args.liger else ''}: {median:.3f} s/step "
        f"({late[0]:.3f} to {late[-1]:.3f}), {tokens:,.0f} tokens/s, {peak:.1f} GiB allocated"
    )


if __name__ == "__main__":
    main()
