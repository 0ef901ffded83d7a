"""A live model's adapters to PEFT folders, and PEFT's own word on what such a folder computes."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftmeg import distributed
from swiftmeg.args.resolve import read_args_file, write_args_file
from swiftmeg.export.atomic_folder import publish
from swiftmeg.export.chat_template import write_chat_template
from swiftmeg.models.hf import HFModel
from swiftmeg.models.layout import Dims
from swiftmeg.tuners.hf_form import to_hf_form
from swiftmeg.tuners.peft_writer import write_folder


def save_peft(models: list[Any], folder: Path, args: Any, model: HFModel, dims: Dims) -> None:
    """Write a live model's adapters as a PEFT folder, whole or not at all. Collective.

    `args` are those of the training run; they come along as args.json.
    """
    adapters = to_hf_form(models, model.family, model.config, dims)
    if adapters is not None:
        unfinished = folder.parent / f".{folder.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_folder(unfinished, adapters, args, base_folder(args, model), model)
        write_args_file(unfinished, args, {})
        if args.template is not None or args.system is not None:
            model.tokenizer().save_pretrained(unfinished)
        write_chat_template(unfinished, model, args)
        publish(unfinished, folder)
    distributed.barrier()


def base_folder(args: Any, model: HFModel) -> str | None:
    """The HF folder whose weights the adapters were trained on; None if only Megatron has them."""
    if args.load is None:
        return str(model.folder)
    made = read_args_file(args.load)
    converted = made.get("to_mcore") and not made.get("mcore_adapters") and not made.get("adapters")
    return str(model.folder) if converted else None


def peft_logits(model: Path, folder: Path, ids: Tensor, vocab_size: int) -> Tensor:
    """fp32 logits [1, s, vocabulary] of an HF folder's model with a PEFT folder beside it.

    The model gets `vocab_size` rows for tokens, of which the folder knows the values.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if base.config.vocab_size != vocab_size:
        base.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        both = PeftModel.from_pretrained(base, folder).to(ids.device).eval()
        logits: Tensor = both(ids).logits
    return logits.float()
