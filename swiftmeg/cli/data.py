"""megatron data."""

import os
import sys
from pathlib import Path
from typing import Any

from swiftmeg.args.check import check_writable
from swiftmeg.args.commands import PrepareArguments
from swiftmeg.args.training import read_training_arguments
from swiftmeg.cli.console import start_logging
from swiftmeg.errors import UserError


def main(argv: list[str]) -> None:
    """Prepare the data of a training command, and show them."""
    start_logging()
    args, _, model = read_training_arguments(PrepareArguments, argv, "megatron data")
    if not args.dataset:
        raise UserError("--dataset is needed: name at least one file, folder or hub id")
    if args.streaming:
        raise UserError(
            "--streaming true: a stream is not prepared: drop it, and look at the first N rows "
            "by #N behind a dataset's name"
        )
    picture = Path(args.inspect_output)
    if args.inspect:
        check_writable("--inspect_output", picture.parent)
    _prepare(args, model, picture)


def _prepare(args: Any, model: Any, picture: Path) -> None:
    # After the flags have been checked: these take seconds to import.
    from swiftmeg.data.inspection import draw_lengths, marked_text, report
    from swiftmeg.trainers.data import prepare_data

    packing, args.packing, args.lazy_tokenize = args.packing, False, False
    args.train_iters, args.max_epochs = 1, None
    data = prepare_data(args, model)
    lengths, trained = data.train.lengths(), data.train.trained()
    if args.inspect:
        tokenizer = model.tokenizer()
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        for index in range(min(args.inspect_samples, len(data.train))):
            row = data.train[index]
            share = trained[index] / lengths[index]
            print(f"--- row {index + 1}: {lengths[index]} tokens, {share:.1%} trained")
            print(marked_text(tokenizer, row, colour))
        print("---")
    max_length = args.max_length or (int(lengths.max()) if not packing else data.longest)
    for line in report(lengths, trained, max_length):
        print(line)
    if data.validation is not None:
        print(f"validation rows: {len(data.validation):,}")
    if args.inspect:
        draw_lengths(lengths, picture)
        print(f"lengths are drawn in {picture}")
