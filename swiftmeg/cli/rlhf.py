"""megatron rlhf."""

from swiftmeg.args.commands import RlhfArguments
from swiftmeg.args.read import read_training_arguments
from swiftmeg.cli.console import start_logging
from swiftmeg.cli.sft import train_or_plan
from swiftmeg.trainers.methods import METHODS


def main(argv: list[str]) -> None:
    """Train on preferences, by the method that --rlhf_type names."""
    start_logging()
    args, sources, model = read_training_arguments(RlhfArguments, argv, "megatron rlhf")
    train_or_plan(METHODS[args.rlhf_type], args, sources, model)
