"""Conversations, and their losses by transformers, which runs are compared with."""

import json
from pathlib import Path
from typing import Any

import torch


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations of very different lengths, some of two turns."""
    made = []
    for i in range(count):
        turns = [{"role": "user", "content": f"question {i} " + "x" * (7 * i % 40)}]
        answer = "yes " * (1 + 5 * i % 13) + ("Action: look " if i % 4 == 1 else "")
        turns.append({"role": "assistant", "content": answer})
        if i % 3 == 0:
            turns += [
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": f"{i}."},
            ]
        made.append({"messages": turns})
    return made


def write_rows(folder: Path, count: int = 20) -> None:
    """Write `rows` to rows.jsonl."""
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows(count)))


def relative(a: float, b: float) -> float:
    """The difference of two numbers over the larger one."""
    return abs(a - b) / max(abs(a), abs(b))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of `expected`."""
    return float((found - expected).norm() / expected.norm())


def transformers_loss(
    model: Any, folder: Path, count: int = 20, **template_options: Any
) -> torch.Tensor:
    """Mean loss per trained token over `count` rows, one row at a time."""
    from transformers import AutoTokenizer

    from swiftmeg.data.template.template import Template

    template = Template(AutoTokenizer.from_pretrained(folder), **template_options)
    total, trained = torch.zeros(()), 0
    for row in rows(count):
        encoded = template.encode(row)
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(encoded["labels"])[1:]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        weights = torch.tensor(encoded.get("loss_scale", [1.0] * len(encoded["labels"])))[1:]
        total = total + (losses * weights).sum()
        trained += int((labels != -100).sum())
    return total / trained


def unstacked(fused: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of stacked experts, weights or gradients, as one tensor an expert."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in fused.items():
        prefix = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found[f"{prefix}.{expert}.gate_proj.weight"] = gate
                found[f"{prefix}.{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                found[f"{prefix}.{expert}.down_proj.weight"] = down
        else:
            found[name] = tensor
    return found
