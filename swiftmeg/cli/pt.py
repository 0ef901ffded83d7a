"""megatron pt."""

from swiftmeg.args.commands import PtArguments
from swiftmeg.cli.sft import run


def main(argv: list[str]) -> None:
    """Train on every token of plain text."""
    run(PtArguments, argv, "megatron pt")
