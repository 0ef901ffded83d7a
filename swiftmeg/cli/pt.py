"""megatron pt."""

from swiftmeg.cli.sft import run


def main(argv: list[str]) -> None:
    """Train on every token of plain text."""
    run("pt", argv, "megatron pt")
