"""swift export."""

from swiftmeg.args.commands import ExportArguments
from swiftmeg.args.training import read_command
from swiftmeg.cli.console import start_logging
from swiftmeg.export.convert import convert


def main(argv: list[str]) -> None:
    """Convert weights between Hugging Face and Megatron."""
    start_logging()
    args, sources, model = read_command(ExportArguments, argv, "swift export", "mcore_model")
    convert(args, sources, model)
