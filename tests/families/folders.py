"""Specimens as folders: random weights in the published form, and transformers' logits.

Every parameter and buffer is random: with default values, swapped norms and forgotten biases would
pass.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.families.specimens import ALL, Specimen

TOKENS = 90


def write(folder: Path, specimen: Specimen, seed: int) -> None:
    """Write a specimen as published, and the logits of random token ids into expected.pt."""
    config = specimen.config()
    torch.manual_seed(seed)
    if specimen.build is None:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = specimen.build(config)
    randomise(model)
    if specimen.build is None:
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        save_file(published(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(specimen.published(json.loads(path.read_text()))))
    ids = torch.randint(0, config.vocab_size, (1, TOKENS))
    with torch.no_grad():
        logits = model.eval()(ids).logits.float()
    torch.save({"ids": ids, "logits": logits}, folder / "expected.pt")


def write_named(folder: Path, name: str) -> None:
    """Write the specimen of a name."""
    write(folder, ALL[name], seed=sum(map(ord, name)))


def randomise(model: torch.nn.Module) -> None:
    """Give every parameter and every stored buffer a random value, norms one near their default."""
    stored = model.state_dict()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name not in stored:
                continue
            scale = 0.3 if tensor.dim() == 1 or "bias" in name else 1.5 / tensor.shape[-1] ** 0.5
            default = float(tensor.float().mean()) if "norm" in name else 0.0
            tensor.normal_(default, scale)


def published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with one tensor an expert, from transformers' one a layer."""
    result = {}
    for name, tensor in weights.items():
        if name.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                prefix = name.removesuffix("gate_up_proj") + f"{number}."
                result[prefix + "gate_proj.weight"] = gate.contiguous()
                result[prefix + "up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for number, expert in enumerate(tensor):
                prefix = name.removesuffix("down_proj") + f"{number}."
                result[prefix + "down_proj.weight"] = expert.contiguous()
        else:
            result[name] = tensor.contiguous()
    return result


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
