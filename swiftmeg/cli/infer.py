"""swift infer."""

import sys
from pathlib import Path

from swiftmeg.args.flags import parse_flags
from swiftmeg.args.infer import InferArguments
from swiftmeg.args.plugins import load_plugins
from swiftmeg.args.resolve import read_args_file, resolve
from swiftmeg.args.tuner import named_by_peft
from swiftmeg.cli.console import start_logging
from swiftmeg.errors import UserError
from swiftmeg.models.hf import find_folder

INHERITED = ("template", "system", "use_chat_template")
"""What a model's args.json says about how it wants to be asked."""


def main(argv: list[str]) -> None:
    """Chat with a model, or let it answer the rows of a dataset."""
    start_logging()
    given = parse_flags(InferArguments, argv, "swift infer")
    named = named_by_peft(given["adapters"][0]) if given.get("adapters") else {}
    model = given.get("model") or named.get("model")
    if model is None:
        raise UserError("swift infer: --model is required: a Hugging Face folder or hub id")
    folder = find_folder(model, given.get("use_hf", False))
    saved = read_args_file(folder) | named if given.get("load_args", True) else {}
    layer = {name: saved[name] for name in INHERITED if name in saved}
    args, _ = resolve(InferArguments, given, [("args.json", layer)])
    args.check()
    load_plugins(args)
    _run(args, folder)


def _run(args: InferArguments, folder: Path) -> None:
    # After the flags have been checked: transformers takes seconds to import.
    from swiftmeg.inference.answers import answer_rows, read_rows
    from swiftmeg.inference.chat import chat
    from swiftmeg.inference.engine import Engine
    from swiftmeg.inference.results import ResultFile

    rows = read_rows(args) if args.val_dataset else None
    results = ResultFile(Path(args.result_path or ResultFile.default_path(folder)))
    engine = Engine(args, folder)
    if rows is not None:
        answer_rows(engine, rows, results, args)
        return
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())
    chat(engine, results, stream=args.num_beams == 1 if args.stream is None else args.stream)
