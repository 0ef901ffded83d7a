"""swift export."""

from swiftmeg.args.commands import ExportArguments
from swiftmeg.args.read import read_command
from swiftmeg.cli.console import start_logging
from swiftmeg.export.convert import convert
from swiftmeg.tuners.convert import convert as convert_adapters


def main(argv: list[str]) -> None:
    """Convert weights between Hugging Face and Megatron."""
    start_logging()
    args, sources, model = read_command(
        ExportArguments, argv, "swift export", "mcore_model", "mcore_adapters"
    )
    if args.mcore_adapters or args.adapters:
        convert_adapters(args, sources, model)
    else:
        convert(args, sources, model)
