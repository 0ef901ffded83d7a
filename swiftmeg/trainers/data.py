"""Reading and tokenising a run's data, as the flags say."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swiftmeg.args.rules import FP8_MULTIPLE
from swiftmeg.data.collate import Collator, padding_token, untrained
from swiftmeg.data.encoded.encode import encode_rows
from swiftmeg.data.encoded.lazy import LazyDataset
from swiftmeg.data.encoded.packing import PackedDataset
from swiftmeg.data.encoded.tokens import PairDataset
from swiftmeg.data.loader import train_iters
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.stream.stream import RowStream
from swiftmeg.data.template.pairs import PairTemplate
from swiftmeg.data.template.template import Template
from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel
from swiftmeg.trainers.streaming import StreamedData
from swiftmeg.trainers.training_data import TrainingData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoding:
    """How a method makes items of rows."""

    template: Callable[..., Template | PairTemplate]
    """Called with a tokenizer, the arguments and the options of `Template`."""
    encode: Callable[..., Any]
    """Makes a tokenised set: `encode_rows` or `encode_pairs`."""
    filler: Callable[[Any], Any]
    """Makes of an item one that weighs nothing."""
    sample_weight: float | None = None
    """What a sample weighs in the objective; None: its trained tokens."""
    sides: int = 1
    """Samples of an item."""


def _plain_template(tokenizer: Any, args: Any, **options: Any) -> Template:
    return Template(tokenizer, **options)


ROWS = Encoding(_plain_template, encode_rows, untrained)
"""Items are rows."""


def _template_options(args: Any, max_length: int, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "name": args.template or None,
        "system": args.system,
        "max_length": max_length,
        "truncation_strategy": args.truncation_strategy,
        "loss_scale": args.loss_scale or "default",
        "use_chat_template": args.use_chat_template is not False,
        "agent_template": args.agent_template or None,
    }


def length_multiple(args: Any) -> int:
    """What the layout wants the tokens of a micro-batch to be a multiple of."""
    cp = args.context_parallel_size
    multiple = cp * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    if args.fp8_format is not None:
        multiple *= FP8_MULTIPLE[args.fp8_recipe]  # holds for each rank's part
    return math.lcm(multiple, 2 * cp) if cp > 1 else int(multiple)


def prepare_data(args: Any, model: HFModel, encoding: Encoding = ROWS) -> TrainingData:
    """Read and tokenise --dataset and --val_dataset; needs no process group.

    With --streaming, --dataset is only looked at.
    """
    tokenizer = model.tokenizer()
    max_length = args.max_length or int(model.megatron_args["max_position_embeddings"])
    vocab_size = int(model.megatron_args["vocab_size"])
    shared = _template_options(args, max_length, vocab_size)
    template = encoding.template(tokenizer, args, **shared)
    collate = Collator(
        pad_token_id=padding_token(tokenizer, vocab_size),
        padding_free=args.padding_free or args.packing,
        pad_to_multiple_of=length_multiple(args),
        segment_multiple=2 * args.context_parallel_size if args.context_parallel_size > 1 else 1,
        sample_weight=encoding.sample_weight,
    )
    train_rows, validation_rows = _rows(args)
    if args.packing and not args.max_length:
        logger.info(
            "--packing true without --max_length: packs are of %d tokens, the model's "
            "max_position_embeddings",
            max_length,
        )
    options = {"num_proc": args.dataset_num_proc, "strict": args.strict}

    def encode(rows: Any) -> Any:
        if args.lazy_tokenize:
            return LazyDataset(rows, template, **options)
        encoded = encoding.encode(rows, template, **options)
        return PackedDataset(encoded, max_length) if args.packing else encoded

    validation = encode(validation_rows) if validation_rows is not None else None
    common = {"args": args, "collate": collate, "filler": encoding.filler}
    if args.streaming:
        longest = _longest(None, args, max_length, encoding)
        collate.fixed_length = _fixed_length(args, longest)
        return StreamedData(
            train=open_stream(args, template),
            validation=validation,
            longest=longest,
            train_iters=args.train_iters,
            template=template,
            pack_length=max_length if args.packing else None,
            **common,
        )
    train = encode(train_rows)
    if len(train) == 0:
        raise UserError("--dataset: no row is left to train on")
    sets = [rows for rows in (train, validation) if rows is not None]
    longest, *rest = (_longest(rows, args, max_length, encoding) for rows in sets)
    collate.fixed_length = _fixed_length(args, max(longest, *rest) if rest else longest)
    return TrainingData(
        train=train,
        validation=validation,
        longest=longest,
        train_iters=_train_iters(len(train), args),
        **common,
    )


def _longest(items: Any | None, args: Any, max_length: int, encoding: Encoding) -> int:
    """The most tokens that an item brings to a micro-batch, or its longest row where that is padded
    to the others; `items` None are those of a stream."""
    together = args.padding_free or args.packing
    if isinstance(items, PackedDataset):
        return items.longest
    if items is None or args.lazy_tokenize:
        return max_length * (encoding.sides if together and not args.packing else 1)
    rows = items.sides if isinstance(items, PairDataset) and not together else items
    return int(rows.lengths().max())


def row_options(args: Any) -> dict[str, Any]:
    """How rows are read, in any way of reading them."""
    return {
        "data_seed": args.data_seed,
        "columns": args.columns,
        "strict": args.strict,
        "model_name": args.model_name,
        "model_author": args.model_author,
        "use_hf": args.use_hf,
        "hub_token": args.hub_token,
        "download_mode": args.download_mode,
    }


def open_stream(args: Any, template: Template | PairTemplate) -> RowStream:
    """The stream of --dataset, of which some row can be used."""
    stream = RowStream(
        args.dataset,
        shuffle_buffer_size=args.shuffle_buffer_size if args.dataset_shuffle else 0,
        interleave_prob=args.interleave_prob,
        stopping_strategy=args.stopping_strategy,
        **row_options(args),
    )
    stream.check(template.encode if template.may_exceed_vocabulary else None)
    if args.split_dataset_ratio and not args.val_dataset:
        logger.warning(
            "--split_dataset_ratio %s: no rows are held out from a stream: name some by "
            "--val_dataset",
            args.split_dataset_ratio,
        )
    return stream


def _rows(args: Any) -> tuple[Any, Any | None]:
    """The rows to train on (None with --streaming) and the validation rows, if there are any."""
    options = row_options(args) | {
        "dataset_num_proc": args.dataset_num_proc,
        "load_from_cache_file": args.load_from_cache_file,
    }
    train = validation = None
    if not args.streaming:
        train, validation = load_rows(
            args.dataset,
            split_dataset_ratio=0.0 if args.val_dataset else args.split_dataset_ratio,
            dataset_shuffle=args.dataset_shuffle,
            interleave_prob=args.interleave_prob,
            stopping_strategy=args.stopping_strategy,
            **options,
        )
    if args.val_dataset:
        validation, _ = load_rows(args.val_dataset, dataset_shuffle=False, **options)
    if validation is not None and args.val_dataset_shuffle:
        validation = validation.shuffle(seed=args.data_seed, keep_in_memory=True)
    return train, validation


def _fixed_length(args: Any, longest: int) -> int | None:
    """Tokens of every micro-batch where ranks with experts must bring as many, else None."""
    equal = args.moe_token_dispatcher_type == "allgather" or args.moe_pad_expert_input_to_capacity
    if not equal or args.expert_model_parallel_size == 1:
        return None
    multiple = length_multiple(args)
    samples = args.micro_batch_size if args.padding_free or args.packing else 1
    return int(samples * math.ceil(longest / multiple) * multiple)


def _train_iters(rows: int, args: Any) -> int:
    """The smaller of --train_iters and what --max_epochs allow."""
    if args.max_epochs is None:
        return int(args.train_iters)
    iters = train_iters(rows, args.max_epochs, args.global_batch_size)
    left_out = rows * args.max_epochs - iters * args.global_batch_size
    if left_out and iters <= (args.train_iters or iters):
        logger.info(
            "--max_epochs %d: %d %s make %d steps of %d; the last %d fill no global batch and are "
            "left out",
            *(args.max_epochs, rows, "packs" if args.packing else "rows"),
            *(iters, args.global_batch_size, left_out),
        )
    return min(iters, args.train_iters or iters)
