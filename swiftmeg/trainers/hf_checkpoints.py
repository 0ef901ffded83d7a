"""--save_safetensors: Hugging Face's form beside each checkpoint."""

import gc
from pathlib import Path
from typing import Any

from swiftmeg.args.resolve import write_args_file
from swiftmeg.export.chat_template import write_chat_template
from swiftmeg.export.hf_writer import save_hf
from swiftmeg.models.build import dims_of
from swiftmeg.observer import Observer
from swiftmeg.trainers.checkpoints import hf_folder
from swiftmeg.trainers.method import Run
from swiftmeg.tuners.peft_folder import save_peft


class HFCheckpoints(Observer):
    """Writes `iter_N-hf` beside each checkpoint: the whole model, or its adapters."""

    def __init__(self, run: Run, megatron: Any) -> None:
        self.run = run
        self.megatron = megatron

    def saved(self, iteration: int, models: list[Any]) -> None:
        model, dims = self.run.model, dims_of(self.megatron)
        folder = hf_folder(self.run.folder, iteration)
        if self.run.args.is_lora:
            save_peft(models, folder, self.run.args, model, dims)
            return
        save_hf(
            *(models, folder, model.folder, model.family, model.config, dims),
            dtype=self.megatron.params_dtype,
            overrides=model.overrides,
            beside=self._write_prompt,
        )
        gc.collect()

    def _write_prompt(self, folder: Path) -> None:
        """Say how the model was asked, to `swift infer` and to transformers."""
        write_args_file(folder, self.run.args, self.run.sources)
        write_chat_template(folder, self.run.model, self.run.args)
