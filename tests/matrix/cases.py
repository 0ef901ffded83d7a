"""The matrix: models, forms of batches and layouts. A row is one line.

A layout is written in words: `tp2 sp pp2 vpp2 cp2 dp2 ep2 etp1`; a size that is not named is 1, and
the words of WORDS switch something on.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.sizes import BIASED, GROUPED, MLA, MOE
from tests.tiny import save_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # grouped queries, tied embeddings, biases everywhere
    "dense": ("llama", BIASED | {"tie_word_embeddings": True}),
    # normalised queries and keys, a head of its own
    "dense-qk": ("qwen3", GROUPED | {"head_dim": 16}),
    "moe": ("qwen2_moe", MOE),
    "mla": ("deepseek_v3", MLA),
}
"""Name -> family and sizes of tests.tiny; all have four layers."""

EXPERTS = {"moe_router_bias_update_rate": 0, "moe_aux_loss_coeff": 0}
LORA = {"train_type": "lora", "lora_rank": 4, "lora_dropout": 0, "lr": 1e-2, "adam_eps": 0.1}
EXTRA: dict[str, dict[str, Any]] = {
    "moe": EXPERTS,
    "mla": EXPERTS,
    "dense-lora": LORA | {"lora_bias": "all", "modules_to_save": "word_embeddings"},
    "dense-qk-lora": LORA
    | {"target_modules": "all-linear all-embedding output_layer", "use_rslora": "true"},
    "moe-lora": LORA | EXPERTS | {"target_modules": "all-linear all-router", "lorap_lr_ratio": 4},
    "mla-lora": LORA | EXPERTS | {"modules_to_save": "router output_layer pre_mlp_layernorm"},
}
"""Flags of a model, in every run of it."""

DPO = {"rlhf_type": "dpo", "max_length": 300}
LIVE = LORA | {"precompute_ref_log_probs": "false"}
EXTRA |= {
    "dpo-dense": DPO,
    "dpo-moe": DPO | EXPERTS,
    "dpo-mla": DPO | EXPERTS,
    "dpo-dense-lora": DPO | LIVE,
    "dpo-moe-lora": DPO | LIVE | EXPERTS | {"target_modules": "all-linear all-router"},
    "dpo-mla-lora": DPO | LIVE | EXPERTS,
}

MODELS |= {
    name: MODELS[name.removeprefix("dpo-").removesuffix("-lora")]
    for name in EXTRA
    if name not in MODELS
}

MAX_LENGTH = 150
FORMS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": "false", "global_batch_size": 16},
    "padding_free": {"padding_free": "true", "global_batch_size": 16},
    "packed": {"packing": "true", "max_length": MAX_LENGTH, "global_batch_size": 8},
}
"""Each step trains on all sixteen rows, which make eight packs, so all forms have one reference."""

PAIR_FORMS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": "false", "global_batch_size": 8},
    "padding_free": {"padding_free": "true", "global_batch_size": 8},
    "packed": {"packing": "true", "global_batch_size": 4},
}
"""Eight pairs make packs of one, two, two and three."""

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first": "decoder_first_pipeline_num_layers",
    "last": "decoder_last_pipeline_num_layers",
}
WORDS: dict[str, dict[str, Any]] = {
    "written": {"pipeline_model_parallel_layout": "Et|tt|t|L"},
    "accounted": {
        "account_for_embedding_in_pipeline_split": "true",
        "account_for_loss_in_pipeline_split": "true",
    },
    "sp": {"sequence_parallel": "true"},
    "overlap": {"overlap_grad_reduce": "true", "overlap_param_gather": "true"},
    "replicated": {"use_distributed_optimizer": "false"},
    "recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@dataclass(frozen=True)
class Row:
    """One run that is compared with the run of one process on the same rows."""

    model: str
    layout: str
    form: str
    micro_batch_size: int = 1
    short: bool = False
    """Part of the short form."""

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers in the layout, by word."""
        found = (re.fullmatch(r"([a-z]+)(\d+)", word) for word in self.layout.split())
        return {match[1]: int(match[2]) for match in found if match}

    @property
    def is_lora(self) -> bool:
        """True if adapters are trained."""
        return self.model.endswith("-lora")

    @property
    def method(self) -> str:
        """The training method's name."""
        return "dpo" if self.model.startswith("dpo-") else "sft"

    @property
    def world(self) -> int:
        """Processes."""
        sizes = self.sizes
        return sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1) * sizes.get("dp", 1)

    @property
    def flags(self) -> dict[str, Any]:
        """What the row adds to the command."""
        flags = (
            EXTRA.get(self.model, {})
            | (PAIR_FORMS if self.method == "dpo" else FORMS)[self.form]
            | {"micro_batch_size": self.micro_batch_size}
        )
        for word, size in self.sizes.items():
            if word != "dp":
                flags[SIZES[word]] = size
        for word in self.layout.split():
            if not re.search(r"\d", word):
                flags |= WORDS[word]
        return flags

    def __str__(self) -> str:
        return f"{self.model} | {self.layout or 'one'} | {self.form} | {self.micro_batch_size}"


def _table(model: str, text: str) -> list[Row]:
    """Rows from lines `layout | form | micro-batch size`; a star in front: in the short form."""
    rows = []
    for line in text.strip().splitlines():
        layout, form, size = (cell.strip() for cell in line.split("|"))
        starred = layout.startswith("*")
        rows.append(Row(model, layout.lstrip("* "), form, int(size), starred))
    return rows


DENSE = """
*                  | padded       | 4
                   | padding_free | 2
*                  | packed       | 1
                   | packed       | 4
  recompute        | packed       | 2
* dp2              | packed       | 2
  dp2 overlap      | padding_free | 1
  dp2 replicated   | padded       | 2
  dp8              | packed       | 1
  tp2              | padding_free | 2
* tp2 sp           | padded       | 4
  tp2 sp           | packed       | 1
  pp2              | padding_free | 4
  pp2 first1       | packed       | 2
* pp4              | packed       | 1
  pp3 accounted    | padding_free | 2
  pp2 vpp2         | padded       | 2
* pp2 vpp2         | packed       | 1
* pp2 written      | padding_free | 2
  pp4 written      | packed       | 1
* pp2 vpp2 cp2     | packed       | 2
  cp2              | padded       | 4
* cp2              | packed       | 2
  cp2              | padding_free | 1
  cp4              | padding_free | 4
* cp4              | packed       | 1
* tp2 sp cp2       | padded       | 2
  tp2 cp2          | packed       | 1
* pp2 cp2          | packed       | 2
  dp2 cp2          | padding_free | 2
* tp2 sp pp2       | padding_free | 2
  tp2 sp dp2       | packed       | 2
  pp2 dp2 overlap  | padded       | 2
  tp2 sp pp2 cp2   | packed       | 1
  tp2 sp pp2 dp2   | packed       | 2
  tp2 sp cp2 dp2   | padding_free | 2
  pp2 cp2 dp2      | padded       | 2
"""

DENSE_QK = """
* tp2 sp           | packed       | 2
  tp2 sp           | padded       | 1
  pp2              | padded       | 2
  cp2              | packed       | 1
  cp4              | padded       | 2
  dp2 overlap      | packed       | 2
* tp2 sp pp2 cp2   | packed       | 1
"""

MOE = """
                   | padded       | 4
*                  | packed       | 2
* ep2 dp2          | padding_free | 2
  ep4 dp4          | packed       | 1
  tp2 sp           | packed       | 2
* tp2 sp etp1      | padded       | 2
* tp2 sp ep2 etp1  | packed       | 1
  tp2 sp etp2 ep2 dp2 | padding_free | 2
  pp2 ep2 dp2      | packed       | 1
  pp2 vpp2         | padded       | 2
* cp2 ep2          | packed       | 2
  cp2 ep2 pp2      | padding_free | 1
  tp2 sp ep2 etp1 pp2 cp2 | packed | 1
"""

MLA = """
                   | padded       | 4
* ep2 dp2          | packed       | 2
  tp2 sp           | padding_free | 2
* tp2 sp ep2 etp1  | packed       | 1
  pp2              | packed       | 2
* cp2              | padding_free | 2
  cp4              | packed       | 1
  cp2 ep2          | padded       | 4
  tp2 sp cp2 ep2 etp1 | packed    | 2
"""

DENSE_LORA = """
                   | padded       | 4
  tp2              | padding_free | 2
* tp2 recompute    | padded       | 2
* tp2 sp           | packed       | 1
  pp2              | padding_free | 2
* pp2 vpp2         | padded       | 2
  cp2              | packed       | 2
  dp2 overlap      | packed       | 2
  tp2 sp pp2 cp2   | packed       | 1
"""

DENSE_QK_LORA = """
  tp2              | padded       | 4
* tp2 sp pp2       | padding_free | 2
* cp2 dp2          | packed       | 2
"""

MOE_LORA = """
                   | packed       | 2
* ep2 dp2          | padding_free | 2
* tp2 sp           | packed       | 2
* tp2 sp ep2 etp1  | padded       | 2
  tp2 sp etp2 ep2 dp2 | padding_free | 2
  pp2 vpp2         | packed       | 1
  cp2 ep2          | packed       | 2
  tp2 sp ep2 etp1 pp2 cp2 | packed | 1
"""

MLA_LORA = """
                   | padded       | 4
* tp2 sp           | padding_free | 2
  tp2 sp ep2 etp1  | packed       | 1
* pp2 first1 ep2 dp2 | packed     | 2
  cp2              | padding_free | 2
  tp2 sp cp2 ep2 etp1 | packed    | 2
"""

DPO_DENSE = """
                   | padded       | 4
*                  | packed       | 1
* dp2              | packed       | 2
* tp2 sp           | padded       | 4
  tp2              | padding_free | 2
* pp2 vpp2         | packed       | 1
* pp2 cp2          | packed       | 2
* cp2              | padded       | 2
  cp4              | packed       | 1
  tp2 sp pp2 cp2   | packed       | 1
  tp2 sp dp2 overlap | padding_free | 2
"""

DPO_MOE = """
                   | padded       | 4
* ep2 dp2          | padding_free | 2
* tp2 sp ep2 etp1  | packed       | 1
* cp2 ep2          | packed       | 2
  pp2 ep2 dp2      | packed       | 1
"""

DPO_MLA = """
                   | padding_free | 2
* ep2 dp2          | packed       | 2
  tp2 sp           | padded       | 4
* cp2              | padding_free | 2
  pp2              | packed       | 2
"""

DPO_DENSE_LORA = """
                   | padded       | 4
* tp2 sp           | packed       | 1
* pp2 vpp2         | padded       | 2
  cp2 dp2          | packed       | 2
  tp2 sp pp2 cp2   | padding_free | 1
"""

DPO_MOE_LORA = """
                   | packed       | 2
* ep2 dp2          | padding_free | 2
  tp2 sp ep2 etp1  | padded       | 2
"""

DPO_MLA_LORA = """
* cp2              | packed       | 2
  tp2 sp ep2 etp1  | padding_free | 1
"""

ROWS = [
    *_table("dense", DENSE),
    *_table("dense-qk", DENSE_QK),
    *_table("moe", MOE),
    *_table("mla", MLA),
    *_table("dense-lora", DENSE_LORA),
    *_table("dense-qk-lora", DENSE_QK_LORA),
    *_table("moe-lora", MOE_LORA),
    *_table("mla-lora", MLA_LORA),
    *_table("dpo-dense", DPO_DENSE),
    *_table("dpo-moe", DPO_MOE),
    *_table("dpo-mla", DPO_MLA),
    *_table("dpo-dense-lora", DPO_DENSE_LORA),
    *_table("dpo-moe-lora", DPO_MOE_LORA),
    *_table("dpo-mla-lora", DPO_MLA_LORA),
]


def write_inputs(folder: Path, models: set[str], **changes: Any) -> None:
    """Write the models and the rows; `changes` are sizes that all models get."""
    for name in models:
        family, sizes = MODELS[name]
        save_model(folder / name, family, **sizes | changes)
    write_rows(folder)
    write_pairs(folder)


def write_rows(folder: Path) -> None:
    """Write conversations of awkward lengths, 25 to 125 tokens, to rows.jsonl."""
    lines = []
    for i in range(16):
        # pairs of rows fill a pack of MAX_LENGTH
        wanted = 25 + 3 * i if i < 8 else 125 - 3 * (i - 8)
        answer = "ab c"[: 1 + i % 4] * 30
        turns = [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": ""}]
        spare = wanted - sum(len(f"{t['role']}{t['content']}") + 4 for t in turns)
        turns[0]["content"] += "?" * (spare // 3)
        turns[1]["content"] = (answer * 2)[: spare - spare // 3]
        lines.append(json.dumps({"messages": turns}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


PAIR_TOKENS = ((150, 140), (100, 60), (50, 100), (98, 52), (40, 90), (30, 68), (60, 38), (49, 49))
"""Tokens of both sides of each pair."""


def write_pairs(folder: Path) -> None:
    """Write preference pairs with awkward answers to pairs.jsonl."""
    lines = []
    for i, sides in enumerate(PAIR_TOKENS):
        frame = sum(len(role) + 4 for role in ("user", "assistant"))
        question = f"{i}" + "?" * (i % 5)
        spare = [size - frame - len(question) for size in sides]
        chosen = ("ab c"[: 1 + i % 4] * 150)[: spare[0]]
        rejected = ("dcb e"[: 1 + i % 5] * 150)[: spare[1]]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": chosen}]
        lines.append(json.dumps({"messages": turns, "rejected_response": rejected}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
