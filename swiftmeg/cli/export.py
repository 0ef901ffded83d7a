"""swift export."""

from swiftmeg.args.commands import ExportArguments
from swiftmeg.args.parser import parse_flags
from swiftmeg.args.resolve import resolve
from swiftmeg.args.training import inherited, read_named_model
from swiftmeg.cli.console import start_logging
from swiftmeg.export.convert import convert


def main(argv: list[str]) -> None:
    """Convert weights between Hugging Face and Megatron."""
    start_logging()
    given = parse_flags(ExportArguments, argv, "swift export")
    layers = inherited(given.get("mcore_model"), given.get("load_args", True))
    args, sources = resolve(ExportArguments, given, layers)
    convert(args, sources, read_named_model(args))
