"""The training methods by name, and which of them are those of `megatron rlhf`."""

from swiftmeg.trainers.dpo import Dpo
from swiftmeg.trainers.method import Method
from swiftmeg.trainers.sft import Pt, Sft

METHODS: dict[str, Method] = {
    "sft": Sft(),
    "pt": Pt(),
    "dpo": Dpo(),
}
