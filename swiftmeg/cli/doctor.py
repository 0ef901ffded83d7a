"""megatron doctor: what is installed here, what that enables, and how to get the rest."""

import importlib.metadata
import importlib.util
import platform as system
import sys
from dataclasses import dataclass

from swiftmeg import platform
from swiftmeg.errors import UserError

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "transformer-engine",
    "flash-attn",
    "apex",
    "wandb",
    "modelscope",
    "huggingface-hub",
)
"""Distributions whose versions are shown."""


@dataclass(frozen=True)
class Finding:
    """Something that commands or flags need."""

    there: bool
    what: str
    """What is there, or is not."""
    meaning: str
    """What works by it, or does not without it."""
    remedy: str = ""
    """How to get it."""
    required: bool = False

    def lines(self) -> list[str]:
        """As shown: one line, and one for the remedy where something is missing."""
        mark = "ok  " if self.there else "FAIL" if self.required else "--  "
        lines = [f"{mark}  {self.what}: {self.meaning}"]
        if not self.there and self.remedy:
            lines.append(f"      fix: {self.remedy}")
        return lines


def main(argv: list[str]) -> int:
    """Print the report; 1 if training cannot work at all."""
    if argv:
        raise UserError(f"megatron doctor takes no flags, but got {' '.join(argv)}: drop them")
    import torch

    print(f"Python {system.python_version()}, {system.system()} {system.machine()}")
    print("  ".join(f"{name} {_version(name) or '-'}" for name in PACKAGES))
    print(f"CUDA {torch.version.cuda or '-'}  NCCL {_nccl()}  GPUs {_gpus()}")
    print()
    findings = examine()
    for finding in findings:
        print("\n".join(finding.lines()))
    return int(any(each.required and not each.there for each in findings))


def examine() -> list[Finding]:
    """What was found on this machine."""
    gpu, engine = platform.has_cuda(), _installed("transformer_engine")
    return [
        Finding(
            sys.version_info >= (3, 12),
            f"Python {system.python_version()}",
            "megatron-core 0.19 needs 3.12 or newer",
            "make an environment with Python 3.12",
            required=True,
        ),
        _megatron(),
        Finding(
            gpu,
            "GPU" if gpu else "no GPU",
            "trains in bf16 over NCCL"
            if gpu
            else "commands run on the CPU, in fp32 over gloo; "
            "--fp16, --fp8_format, --use_precision_aware_optimizer, --optimizer_cpu_offload and "
            "--tp_comm_overlap are refused",
            "run on a machine with an NVIDIA GPU whose driver suits CUDA "
            f"{_cuda() or 'of a CUDA build of torch'}; --dry_run true plans without one",
        ),
        Finding(
            gpu and engine,
            "TransformerEngine" if engine else "no TransformerEngine",
            "its layers are used"
            if gpu and engine
            else "the native layers are used, which are "
            "slower; --transformer_impl transformer_engine, --fp8_format and "
            "--use_precision_aware_optimizer are refused",
            "pip install 'swiftmeg[te]' (needs the CUDA toolkit)"
            if not engine
            else "it is installed, but works with a GPU only",
        ),
        _fp8(gpu and engine),
        *([_cudnn()] if gpu and engine else []),
        Finding(
            _installed("fused_weight_gradient_mlp_cuda"),
            "apex's weight-gradient kernel",
            "gradients add up inside the product"
            if _installed("fused_weight_gradient_mlp_cuda")
            else "not there: TransformerEngine's layers and experts add them up all the same",
            "none needed: the output layer alone is left",
        ),
        Finding(
            _installed("wandb"), "wandb", "for --wandb_project", "pip install 'swiftmeg[wandb]'"
        ),
        Finding(
            _installed("modelscope"),
            "modelscope",
            "for model and dataset ids of ModelScope",
            "pip install modelscope, or use ids of Hugging Face with --use_hf true",
        ),
        _shared_memory(),
    ]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _megatron() -> Finding:
    version = _version("megatron-core")
    fits = version is not None and version.startswith("0.19.") and _installed("megatron.training")
    return Finding(
        fits,
        f"megatron-core {version or 'is missing'}",
        "training and conversion" if fits else "nothing can be trained or converted",
        "pip install 'megatron-core[training]>=0.19.2,<0.20'",
        required=True,
    )


def _fp8(usable: bool) -> Finding:
    import torch

    able = usable and torch.cuda.get_device_capability() >= (8, 9)
    return Finding(
        able,
        "FP8" if able else "no FP8",
        "--fp8_format works" if able else "--fp8_format is refused",
        "use TransformerEngine on a GPU of compute capability 8.9 or more (Ada, Hopper, newer)",
    )


def _cudnn() -> Finding:
    """TransformerEngine loads the system's cuDNN, even one that is too old for torch."""
    import torch
    import transformer_engine.pytorch  # noqa: F401

    try:
        version = torch.backends.cudnn.version()
    except RuntimeError:
        version = None
    return Finding(
        version is not None,
        f"cuDNN {version}" if version else "two versions of cuDNN",
        "torch and TransformerEngine share it"
        if version
        else "TransformerEngine loads one that torch refuses, so native attention of padded "
        "batches takes a slower kernel",
        "use --padding_free true or --packing true, which need neither; do not put torch's "
        "cuDNN into LD_LIBRARY_PATH: TransformerEngine then attends unfused, ten times as long",
    )


def _shared_memory() -> Finding:
    """Loader processes hand batches over in shared memory, which containers often make tiny."""
    import shutil

    try:
        size = shutil.disk_usage("/dev/shm").total / 2**30
    except OSError:
        return Finding(True, "shared memory", "not a file system here")
    return Finding(
        size >= 1,
        f"shared memory of {size:.1f} GiB",
        "enough for --num_workers" if size >= 1 else "loader processes and NCCL may run out of it",
        "start the container with --shm-size=16g, or pass --num_workers 0",
    )


def _cuda() -> str | None:
    import torch

    return torch.version.cuda


def _nccl() -> str:
    import torch

    if not platform.has_cuda():
        return "-"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _gpus() -> str:
    import torch

    if not platform.has_cuda():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{len(names)} x {names[0]} ({total:.0f} GiB)"
