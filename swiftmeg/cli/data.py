"""megatron data."""

import os
import sys
from pathlib import Path
from typing import Any

from swiftmeg.args.check import check_writable
from swiftmeg.args.commands import PrepareArguments
from swiftmeg.args.read import read_training_arguments
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
    from swiftmeg.data.encoded.inspection import draw_lengths, report
    from swiftmeg.trainers.methods import METHODS

    method = METHODS[args.rlhf_type or "sft"]
    packing, args.packing, args.lazy_tokenize = args.packing, False, False
    args.train_iters, args.max_epochs = 1, None
    data = method.prepare_data(args, model)
    sequences = method.sequences(data.train)
    lengths, trained = sequences.lengths(), sequences.trained()
    if args.inspect:
        _show(data.train, min(args.inspect_samples, len(data.train)), model.tokenizer())
    max_length = args.max_length or int(lengths.max())
    if packing and not args.max_length:
        max_length = int(model.megatron_args["max_position_embeddings"])
    if sequences is not data.train:
        print(f"pairs: {len(data.train):,}, of two rows each")
    for line in report(lengths, trained, max_length):
        print(line)
    if data.validation is not None:
        kind = "rows" if sequences is data.train else "pairs"
        print(f"validation {kind}: {len(data.validation):,}")
    if args.inspect:
        draw_lengths(lengths, picture)
        print(f"lengths are drawn in {picture}")


def _show(rows: Any, count: int, tokenizer: Any) -> None:
    """Print the first rows, or both sides of the first pairs."""
    from swiftmeg.data.encoded.inspection import marked_text, trained_share

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for index in range(count):
        item = rows[index]
        sides = {"": item} if "input_ids" in item else item
        for name, row in sides.items():
            title = f"row {index + 1}" if not name else f"pair {index + 1}, {name}"
            print(f"--- {title}: {row['length']} tokens, {trained_share(row):.1%} trained")
            print(marked_text(tokenizer, row, colour))
    print("---")
