"""Train one row of the matrix and compare it with the run of one process.

What is compared, all under Hugging Face names: the loss and the gradient norm of every step, every
gradient of one step as the optimizer gets it, every weight after the last. Besides, copies of a
parameter on different ranks must be bit-identical. What LoRA changes in that is in lora.py.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from swiftmeg.observer import Observer
from tests.matrix import lora
from tests.matrix.cases import Row
from tests.ranks import run_ranks

BOUND = 1e-5
"""Largest difference, relative to the norm of what is compared, in float32."""

LOSS = "lm loss"
OF_PAIRS = ("logps/chosen", "logps/rejected", "nll_loss", "entropy")
"""What is compared of the log beside the loss, where it has it."""

STEPS = 2
ONE = Row("", "", "padding_free")


def flags(work: Path, row: Row, save: Path, extra: dict[str, Any]) -> list[str]:
    """The command line of a row; `extra` wins."""
    settings = (
        {
            "model": work / row.model,
            "dataset": work / ("pairs.jsonl" if row.method == "dpo" else "rows.jsonl"),
            "train_iters": STEPS,
            "lr": 3e-3,
            "lr_decay_style": "constant",
            # A gradient that is zero but for rounding, as that of a key's bias, must not become a
            # full step of Adam.
            "adam_eps": 1e-3,
            "clip_grad": 5.0,
            "attention_dropout": 0,
            "log_interval": 1,
            "num_workers": 0,
            "save": save,
            "add_version": "false",
            "strict": "true",
            "no_save_optim": "true",
        }
        | row.flags
        | extra
    )
    pairs = ((f"--{name}", *str(value).split()) for name, value in settings.items())
    return [word for pair in pairs for word in pair]


def train_row(
    method_name: str, argv: list[str], out: str, mutate: Callable[[], None] | None
) -> list[str]:
    """Train by a method on one rank, with gradients and weights written to `out`.

    Returns what is wrong with this rank's copies of parameters.
    """
    from swiftmeg.args.read import read_training_arguments
    from swiftmeg.trainers import curves
    from swiftmeg.trainers.methods import METHODS
    from swiftmeg.trainers.run import train

    method = METHODS[method_name]
    args, sources, model = read_training_arguments(method.arguments, argv, method_name)
    curves.draw_curves = lambda *args: None
    if mutate is not None:
        mutate()
    kept = Keeper(args, model, Path(out))
    train(args, sources, model, method, [kept])
    return kept.faults


class Keeper(Observer):
    """Writes gradients before a step and weights at the end.

    Gradients are those of the first step; LoRA's are those of the second, since as long as B is
    zero A has none.
    """

    def __init__(self, args: Any, model: Any, out: Path) -> None:
        self.args = args
        self.model = model
        self.out = out
        self.steps = 0
        self.faults: list[str] = []

    def built(self, models: list[Any], optimizer: Any) -> None:
        step = optimizer.step

        def observed() -> Any:
            if self.steps == int(self.args.is_lora):
                self._write_gradients(models)
            self.steps += 1
            return step()

        optimizer.step = observed

    def _write_gradients(self, models: list[Any]) -> None:
        folder, found = self.out / "gradients", gradients(models)
        if self.args.is_lora:
            lora.write(self.args, self.model, models, self.out / "start")
            lora.write(self.args, self.model, models, folder, found)
        else:
            write(self.model, models, folder, found)

    def saved(self, iteration: int, models: list[Any]) -> None:
        self.faults += differing_copies(models)
        if self.args.is_lora:
            lora.write(self.args, self.model, models, self.out / "adapters")
            lora.merge(models)
        write(self.model, models, self.out / "weights")


def write(
    model: Any, models: list[Any], folder: Path, replaced: dict[Any, torch.Tensor] | None = None
) -> None:
    """Write the weights, or what `replaced` has in their place, as a Hugging Face folder."""
    from megatron.training import get_args

    from swiftmeg.export import hf_writer
    from swiftmeg.export.shards import live_weights
    from swiftmeg.models.build import dims_of

    replaced = replaced or {}

    def in_place(models: list[Any]) -> Iterator[Any]:
        for live in live_weights(models):
            yield replace(live, tensor=replaced.get(live.tensor, live.tensor))

    hf_writer.live_weights = in_place
    family, dims = model.family, dims_of(get_args())
    hf_writer.save_hf(models, folder, model.folder, family, model.config, dims, dtype=torch.float32)
    hf_writer.live_weights = live_weights


def gradients(models: list[Any]) -> dict[Any, torch.Tensor]:
    """Every parameter's whole gradient, from the shards that the distributed optimizer leaves."""
    found = {}
    for chunk in models:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            whole = buffer.grad_data.detach().clone().float()
            group = buffer.data_parallel_group
            if chunk.ddp_config.use_distributed_optimizer and group.size() > 1:
                for bucket in buffer.buckets:
                    start = bucket.offset
                    part = whole[start : start + bucket.grad_data.numel()]
                    mine = part.chunk(group.size())[group.rank()].clone()
                    torch.distributed.all_gather_into_tensor(part, mine, group=group)
            for parameter, (start, end, _) in buffer.param_index_map.items():
                found[parameter] = whole[start:end].view(parameter.shape)
    return found


def differing_copies(models: list[Any]) -> list[str]:
    """Names of parameters whose copies differ between ranks that must agree."""
    from megatron.core import mpu

    from swiftmeg.export.shards import live_weights

    wrong = lora.differing_copies(models)
    dense = mpu.get_data_parallel_group(with_context_parallel=True)
    experts = mpu.get_expert_data_parallel_group()
    for live in live_weights(models):
        groups = [experts if live.routed else dense]
        if live.axis is None:
            groups.append(live.group)
        for group in groups:
            mine = live.tensor.detach().contiguous()
            first = mine.clone()
            torch.distributed.broadcast(first, group=group, group_src=0)
            if not torch.equal(mine, first):
                wrong.append(live.name)
    return wrong


def run(
    work: Path,
    row: Row,
    name: str | None = None,
    mutate: Callable[[], None] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Train a row with `extra` flags.

    Returns the `folder`, `lines`, the number of the `step` that has `gradients`, `weights` and
    `copies` that differ.
    """
    folder = work / (name or str(row).replace(" | ", "-").replace(" ", "_"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    argv = flags(work, row, folder / "run", extra)
    faults = run_ranks(row.world, train_row, row.method, argv, str(folder), mutate)
    lines = (folder / "run" / "logging.jsonl").read_text().splitlines()
    return {
        "folder": folder,
        "lines": [json.loads(line) for line in lines],
        "step": int(row.is_lora),
        "gradients": {
            name: tensor
            for name, tensor in _tensors(folder / "gradients").items()
            if not name.endswith("e_score_correction_bias")  # a buffer
        },
        "weights": _tensors(folder / "weights") | _tensors(folder / "adapters"),
        "copies": sorted({fault for each in faults for fault in each}),
    }


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def check_trained(found: dict[str, Any]) -> list[str]:
    """Why a run proves nothing: it did not learn, or a tensor had no gradient."""
    first, last = found["lines"][0], found["lines"][-1]
    faults = [name for name, gradient in found["gradients"].items() if not gradient.norm() > 1e-9]
    reasons = [f"no gradient: {', '.join(faults)}"] if faults else []
    loss = LOSS if LOSS in first else "loss"
    if not last[loss] < 0.99 * first[loss]:
        reasons.append(f"the loss stays at {first[loss]}")
    if not first["grad_norm"] > 0:
        reasons.append("the gradient norm is zero")
    return reasons


def one_step(found: dict[str, Any]) -> dict[str, Any]:
    """Of a run the step whose gradients were written, to compare with a reference's."""
    line = found["lines"][found["step"]]
    return found | {"lines": [line], "weights": found["gradients"]}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """The largest relative difference, and where, of losses, norms, gradients and weights."""
    result = {}
    first = expected["lines"][0]
    loss = LOSS if LOSS in first else "loss"
    for key in (loss, "grad_norm", *(name for name in OF_PAIRS if name in first)):
        pairs = zip(found["lines"], expected["lines"], strict=True)
        result["loss" if key == loss else key] = max(
            (_relative(a[key], b[key]), f"step {i + 1}") for i, (a, b) in enumerate(pairs)
        )
    for kind in ("gradients", "weights"):
        ours, theirs = found[kind], expected[kind]
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        # A tensor whose gradient is zero but for rounding has no relative error: the floor is a
        # millionth of the largest gradient.
        floor = 1e-6 * max(float(tensor.norm()) for tensor in theirs.values())
        result[kind] = max(
            (float((ours[k] - theirs[k]).norm() / max(float(theirs[k].norm()), floor)), k)
            for k in theirs
        )
    return {key: (_finite(value), where) for key, (value, where) in result.items()}


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def _finite(value: float) -> float:
    return value if value == value else float("inf")


def faults_of(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in words; empty if nothing is."""
    faults = check_trained(found)
    for key, (value, where) in compare(found, expected).items():
        if not value <= BOUND:
            faults.append(f"{key} differs by {value:.1e} at {where}")
    if found["copies"]:
        faults.append(f"copies differ: {', '.join(found['copies'][:3])}")
    return faults


def _published(parameters: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradients under the names of checkpoints, which hold each expert by itself."""
    for name, parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        folder, _, kind = name.rpartition(".")
        if not folder.endswith("mlp.experts"):
            yield name, gradient
            continue
        for expert, part in enumerate(gradient):
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
            for each, piece in zip(names, part.chunk(len(names)), strict=True):
                yield f"{folder}.{expert}.{each}.weight", piece


def log_probabilities(network: Any, ids: Any, labels: Any) -> torch.Tensor:
    """Those of the trained tokens of one row, [trained]."""
    logits = network(torch.tensor(ids)[None]).logits[0, :-1]
    labels = torch.tensor(labels).long()[1:]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return -losses[labels != -100]


def mean_of_tokens(network: Any, rows: Path, template: Any) -> torch.Tensor:
    """The mean cross entropy of all trained tokens."""
    found = []
    for line in rows.read_text().splitlines():
        encoded = template.encode(json.loads(line))
        found.append(log_probabilities(network, encoded["input_ids"], encoded["labels"]))
    return -torch.cat(found).mean()


def mean_of_pairs(
    network: Any, reference: Any, pairs: Path, tokenizer: Any
) -> dict[str, torch.Tensor]:
    """DPO's loss with the default beta and rpo_alpha, and what is logged beside it."""
    from swiftmeg.data.template.pairs import PairTemplate

    template = PairTemplate(tokenizer, loss_scale="last_round")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    losses, chosen_tokens, sums = [], [], []
    for pair in template.encode_many(rows):
        sides = [log_probabilities(network, *side[:2]) for side in pair]
        with torch.no_grad():
            frozen = [log_probabilities(reference, *side[:2]) for side in pair]
        ratios = [a.sum() - b.sum() for a, b in zip(sides, frozen, strict=True)]
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1])))
        chosen_tokens.append(sides[0])
        sums.append([side.sum().detach() for side in sides])
    nll = -torch.cat(chosen_tokens).mean()
    chosen, rejected = torch.tensor(sums).mean(dim=0)
    loss = torch.stack(losses).mean() + nll
    return {"loss": loss, "nll_loss": nll, "logps/chosen": chosen, "logps/rejected": rejected}


def transformers_step(work: Path, model: str, found: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of all rows in the step of `found` that has gradients.

    One row after the other, as transformers computes them, or PEFT beside it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swiftmeg.data.template.template import Template

    tokenizer = AutoTokenizer.from_pretrained(work / model)
    network = AutoModelForCausalLM.from_pretrained(work / model, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(work / model, dtype=torch.float32)
    if found["step"]:
        network = lora.beside(network, found["folder"] / "start")
    if "lm loss" in found["lines"][0]:
        losses = {LOSS: mean_of_tokens(network, work / "rows.jsonl", Template(tokenizer))}
    else:
        losses = mean_of_pairs(network, reference, work / "pairs.jsonl", tokenizer)
    loss = next(iter(losses.values()))
    loss.backward()
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    line = {name: float(value.detach()) for name, value in losses.items()}
    line["grad_norm"] = float(torch.stack(norms).norm())
    named = lora.gradients(network) if found["step"] else _published(network.named_parameters())
    both = dict(named)
    return {"lines": [line], "gradients": both, "weights": both, "copies": []}
