"""megatron sft."""

from typing import Any

from swiftmeg.args.read import read_training_arguments
from swiftmeg.cli.console import start_logging
from swiftmeg.models.hf import HFModel
from swiftmeg.planning.run import dry_run
from swiftmeg.trainers.method import Method
from swiftmeg.trainers.methods import METHODS
from swiftmeg.trainers.run import train


def main(argv: list[str]) -> None:
    """Fine-tune on the assistant turns of conversations."""
    run("sft", argv, "megatron sft")


def run(name: str, argv: list[str], prog: str) -> None:
    """Read the arguments of the training method `name` and train, or print the plan."""
    start_logging()
    method = METHODS[name]
    args, sources, model = read_training_arguments(method.arguments, argv, prog)
    train_or_plan(method, args, sources, model)


def train_or_plan(method: Method, args: Any, sources: dict[str, str], model: HFModel) -> None:
    """Train, or with --dry_run print the plan."""
    (dry_run if args.dry_run else train)(args, sources, model, method)
