"""Write dpo_reference.json: what TRL's own DPOTrainer computes on a tiny model and a few pairs.

`python -m tests.trainers.make_dpo_reference` wants TRL 1.16, which the tests do not: they read the
file. Every case of CASES starts from the same model, trains STEPS steps of AdamW and records, of
the first step, the loss, the metrics and for each parameter's gradient its norm and `projection`,
and the loss of every step. Tokens and their order are those of `megatron rlhf`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from swiftmeg.data.loader import BatchLoader
from swiftmeg.data.template.pairs import PairTemplate
from tests.tiny import save_model

FILE = Path(__file__).with_name("dpo_reference.json")
SIZES = {"num_hidden_layers": 2}
BATCH, STEPS, LR, EPSILON = 4, 10, 2e-4, 1e-3
MAX_LENGTH = 512

CASES: dict[str, dict[str, Any]] = {
    **{
        name: {"loss_type": [name]}
        for name in (
            "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
            "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
        )
    },
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "aot smoothed": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": ["ipo"]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "discopop_tau": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "rpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
    "use_weighting": {"use_weighting": True},
    "weighted ipo": {"use_weighting": True, "loss_type": ["ipo"]},
}  # fmt: skip
"""Arguments of TRL's DPOConfig beside beta."""
BETA = 0.3


def rows() -> list[dict[str, Any]]:
    """Pairs of answers of many lengths."""
    made = []
    for i in range(6):
        asked = {"role": "user", "content": f"{i} plus {i}" + "?" * (i % 3 + 1)}
        said = {"role": "assistant", "content": f"{2 * i}, of course" if i % 2 else f"{2 * i}"}
        made.append({"messages": [asked, said], "rejected_response": "no " * (i % 4 + 1) + str(i)})
    return made


def save_models(folder: Path) -> tuple[Path, Path]:
    """Write the model that is trained and the reference, whose weights are a little different."""
    start = save_model(folder / "model", "llama", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(start)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02 * parameter.std())
    model.save_pretrained(folder / "reference")
    AutoTokenizer.from_pretrained(start).save_pretrained(folder / "reference")
    return start, folder / "reference"


def projection(gradient: Tensor) -> float:
    """The product of a gradient with fixed numbers: what its norm does not tell."""
    values = gradient.detach().double().flatten()
    return float(values @ torch.cos(torch.arange(len(values), dtype=torch.float64)))


def batches(folder: Path) -> list[dict[str, Tensor]]:
    """The steps' pairs as TRL's collator makes them: all chosen answers, then all rejected."""
    template = PairTemplate(AutoTokenizer.from_pretrained(folder), max_length=MAX_LENGTH)
    pairs: list[Any] = template.encode_many(rows())
    loader = BatchLoader(
        list(range(len(pairs))), list, micro_batch_size=BATCH, global_batch_size=BATCH,
        dp_rank=0, dp_size=1,
    )  # fmt: skip
    made = []
    for _, chosen in zip(range(STEPS), loader, strict=False):
        sides = [pairs[i].chosen for i in chosen] + [pairs[i].rejected for i in chosen]
        width = max(len(side.input_ids) for side in sides)
        batch = {
            name: torch.zeros(len(sides), width, dtype=torch.long)
            for name in ("input_ids", "attention_mask", "completion_mask")
        }
        for index, side in enumerate(sides):
            length = len(side.input_ids)
            batch["input_ids"][index, :length] = torch.from_numpy(side.input_ids)
            batch["attention_mask"][index, :length] = 1
            batch["completion_mask"][index, :length] = torch.from_numpy(side.labels >= 0)
        made.append(batch)
    return made


def trl_case(options: dict[str, Any], start: Path, reference: Path) -> dict[str, Any]:
    """Train with TRL's loss; see the module."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(start.parent / "out"), beta=BETA, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    asked, said = ([{"role": role, "content": "x"}] for role in ("user", "assistant"))
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start),
        ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": asked, "chosen": said, "rejected": said}]),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    model = trainer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPSILON, weight_decay=0.0)
    found: dict[str, Any] = {"losses": []}
    for batch in batches(start):
        loss = trainer._compute_loss(model, batch, False)
        loss.backward()
        found["losses"].append(loss.item())
        if "gradients" not in found:
            metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
            found["metrics"] = {n: v for n, v in metrics.items() if n != "num_tokens"}
            found["gradients"] = {
                name: [p.grad.double().norm().item(), projection(p.grad)]
                for name, p in model.named_parameters()
            }
        optimizer.step()
        optimizer.zero_grad()
    return found


def main() -> None:
    import trl

    with tempfile.TemporaryDirectory() as folder:
        start, reference = save_models(Path(folder))
        cases = {name: trl_case(options, start, reference) for name, options in CASES.items()}
    FILE.write_text(json.dumps({"trl": trl.__version__, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
