"""megatron sft."""

from typing import Any

from swiftmeg.args.commands import SftArguments
from swiftmeg.args.read import read_training_arguments
from swiftmeg.cli.console import start_logging
from swiftmeg.planning.run import dry_run
from swiftmeg.trainers.run import train


def main(argv: list[str]) -> None:
    """Fine-tune on the assistant turns of conversations."""
    run(SftArguments, argv, "megatron sft")


def run(cls: type[Any], argv: list[str], prog: str) -> None:
    """Read the arguments of a training command and train, or print the plan."""
    start_logging()
    args, sources, model = read_training_arguments(cls, argv, prog)
    (dry_run if args.dry_run else train)(args, sources, model)
