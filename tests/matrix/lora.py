"""LoRA's part of a row: its adapters are what has gradients, and they are merged at the end.

So weights are the adapters after the last step and the model that they are merged into, and the
reference is PEFT, which reads the adapters that a run had before the step that is compared.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write(
    args: Any,
    model: Any,
    models: list[Any],
    folder: Path,
    replaced: dict[Any, Tensor] | None = None,
) -> None:
    """Write the adapters, or what `replaced` has in their place, as a PEFT folder."""
    from megatron.training import get_args

    from swiftmeg.models.build import dims_of
    from swiftmeg.tuners.peft_folder import save_peft

    kept = {parameter: parameter.data for parameter in replaced or ()}
    for parameter, tensor in (replaced or {}).items():
        parameter.data = tensor
    save_peft(models, folder, args, model, dims_of(get_args()))
    for parameter, tensor in kept.items():
        parameter.data = tensor


def merge(models: list[Any]) -> None:
    """Merge the adapters and take them away."""
    from megatron.core.utils import unwrap_model

    from swiftmeg.tuners import merge

    merge.merge(unwrap_model(models))


def differing_copies(models: list[Any]) -> list[str]:
    """Names of factors whose copies differ between ranks that must agree."""
    from megatron.core import mpu

    from swiftmeg.tuners.adapters import attached

    wrong = []
    dense = mpu.get_data_parallel_group(with_context_parallel=True)
    experts = mpu.get_expert_data_parallel_group()
    for each in attached(models):
        for letter, factor in (("A", each.adapter.A), ("B", each.adapter.B)):
            groups = [experts if factor.weight.dim() == 3 else dense]
            if factor.axis is None:
                groups.append(each.adapter.group)
            for group in groups:
                first = factor.weight.detach().clone()
                torch.distributed.broadcast(first, group=group, group_src=0)
                if not torch.equal(factor.weight, first):
                    wrong.append(f"{each.name}.lora_{letter}")
    return wrong


def beside(network: Any, folder: Path) -> Any:
    """PEFT's model of a folder; layers that are one in Megatron share their A."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(network, folder, is_trainable=True)
    for module in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            layers = [getattr(module, name, None) for name in names]
            if all(hasattr(layer, "lora_A") for layer in layers):
                for layer in layers[1:]:
                    layer.lora_A["default"].weight = layers[0].lora_A["default"].weight
    return model


def gradients(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Gradients under the names of a PEFT folder."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.grad is not None and ".original_module." not in name:
            yield (
                name.replace("vector.default.weight", "vector")
                .replace(".default", "")
                .replace(".modules_to_save", ""),
                parameter.grad,
            )
