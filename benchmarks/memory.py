"""Memory of each rank as layouts and recomputation change: `python -m benchmarks.memory`.

Trains a step of a model whose activations outweigh its weights, on CPU processes, and prints
how much the largest rank's resident memory grows while training (GiB).
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.matrix.__main__ import header, quiet, table_line
from tests.ranks import run_ranks
from tests.tiny import save_model

TOKENS = 2048
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": TOKENS,
}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process, nothing recomputed": (1, {"recompute_granularity": "none"}),
    "one process, core attention recomputed (default)": (1, {}),
    "one process, layers recomputed": (1, FULL),
    "cp2": (2, {"context_parallel_size": 2}),
    "cp4": (4, {"context_parallel_size": 4}),
    "cp2, layers recomputed": (2, FULL | {"context_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": "true"}),
    "tp2 sp cp2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": "true",
            "context_parallel_size": 2,
        },
    ),
}


def growth(argv: list[str]) -> float:
    """Train on one rank; GiB by which the peak exceeds what was there before the first step."""
    from megatron.training import training

    from swiftmeg.args.commands import SftArguments
    from swiftmeg.args.read import read_training_arguments
    from swiftmeg.trainers.methods import METHODS
    from swiftmeg.trainers.run import train

    before: list[float] = []
    original = training.train

    def watched(*args: Any, **kwargs: Any) -> Any:
        status = Path("/proc/self/status").read_text()
        before.append(int(status.split("VmRSS:")[1].split()[0]) / 2**20)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        result = original(*args, **kwargs)
        status = Path("/proc/self/status").read_text()
        before.append(int(status.split("VmHWM:")[1].split()[0]) / 2**20)
        return result

    training.train = watched
    train(*read_training_arguments(SftArguments, argv, "megatron sft"), METHODS["sft"])
    return before[1] - before[0]


def main() -> None:
    work = Path(tempfile.mkdtemp())
    with quiet():
        save_model(work / "model", "llama", **SIZES)
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]}
    row["messages"][1]["content"] = "x" * (TOKENS - 60)
    (work / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    header("layout", "GiB of the largest rank")
    for number, (name, (world, changes)) in enumerate(RUNS.items()):
        settings = {
            "model": work / "model",
            "dataset": work / "rows.jsonl",
            "train_iters": 1,
            "global_batch_size": 2,
            "num_workers": 0,
            "no_save_optim": "true",
            "save_interval": 1000,
            "save": work / str(number),
            "add_version": "false",
        } | changes
        argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        with quiet():
            grown = run_ranks(world, growth, argv, timeout=600)
        table_line([name, f"{max(grown):.2f}"])


if __name__ == "__main__":
    main()
