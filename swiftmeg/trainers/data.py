"""Training data: rows, tokens and order, up to the iterators that Megatron's loop draws from."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swiftmeg.args.combinations import FP8_MULTIPLE
from swiftmeg.data.collate import Collator
from swiftmeg.data.encode import encode_rows
from swiftmeg.data.loader import BatchLoader, EvalLoader, eval_iters, train_iters
from swiftmeg.data.packing import PackedDataset
from swiftmeg.data.sources import load_rows
from swiftmeg.data.template import Template
from swiftmeg.errors import UserError


@dataclass
class TrainingData:
    """Tokenised sets and how to batch them."""

    train: Any
    validation: Any | None
    collate: Collator
    longest: int
    """Tokens of the longest sample, or of a full pack."""
    train_iters: int
    """Optimizer steps."""
    args: Any

    @property
    def eval_iters(self) -> int:
        """Batches per evaluation; 0 without a validation set."""
        if self.validation is None:
            return 0
        if self.args.eval_iters >= 0:
            return int(self.args.eval_iters)
        return eval_iters(len(self.validation), self.args.global_batch_size)

    def provider(self, megatron: Any) -> Callable[..., tuple[Any, Any, None]]:
        """What Megatron calls for its iterators, with its groups made and a checkpoint loaded."""
        from megatron.core import mpu

        args = self.args

        def provide(sizes: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
            shared = {
                "micro_batch_size": args.micro_batch_size,
                "global_batch_size": args.global_batch_size,
                "dp_rank": mpu.get_data_parallel_rank(),
                "dp_size": mpu.get_data_parallel_world_size(),
                "num_workers": args.num_workers,
            }
            train = BatchLoader(
                self.train,
                self.collate,
                consumed_samples=megatron.consumed_train_samples,
                seed=args.seed,
                **shared,
            )
            validation = None
            if self.validation is not None:
                validation = EvalLoader(self.validation, self.collate, **shared).repeat()
            return iter(train), validation, None

        return provide


def make_template(args: Any, tokenizer: Any) -> Template:
    """The chat template that the template flags describe."""
    return Template(
        tokenizer,
        name=args.template,
        system=args.system,
        max_length=args.max_length,
        truncation_strategy=args.truncation_strategy,
        loss_scale=args.loss_scale or "default",
        use_chat_template=args.use_chat_template is not False,
    )


def length_multiple(args: Any) -> int:
    """What the layout wants the tokens of a micro-batch to be a multiple of."""
    cp = args.context_parallel_size
    multiple = cp * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    if args.fp8_format is not None:
        multiple *= FP8_MULTIPLE[args.fp8_recipe]  # holds for each rank's part
    return math.lcm(multiple, 2 * cp) if cp > 1 else int(multiple)


def prepare_data(args: Any, tokenizer: Any) -> TrainingData:
    """Read and tokenise --dataset and --val_dataset; needs no process group."""
    template = make_template(args, tokenizer)
    options = {
        "data_seed": args.data_seed,
        "dataset_num_proc": args.dataset_num_proc,
        "columns": args.columns,
        "strict": args.strict,
        "model_name": args.model_name,
        "model_author": args.model_author,
        "use_hf": args.use_hf,
        "hub_token": args.hub_token,
        "download_mode": args.download_mode,
        "load_from_cache_file": args.load_from_cache_file,
    }
    ratio = 0.0 if args.val_dataset else args.split_dataset_ratio
    train_rows, validation_rows = load_rows(
        args.dataset,
        split_dataset_ratio=ratio,
        dataset_shuffle=args.dataset_shuffle,
        interleave_prob=args.interleave_prob,
        stopping_strategy=args.stopping_strategy,
        **options,
    )
    if args.val_dataset:
        validation_rows, _ = load_rows(args.val_dataset, dataset_shuffle=False, **options)

    def encode(rows: Any) -> Any:
        encoded = encode_rows(rows, template, num_proc=args.dataset_num_proc, strict=args.strict)
        return PackedDataset(encoded, args.max_length) if args.packing else encoded

    train = encode(train_rows)
    validation = encode(validation_rows) if validation_rows is not None else None
    longest = args.max_length if args.packing else max(train.data.column("length").to_pylist())
    pad_token = tokenizer.pad_token_id
    chunks = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    collate = Collator(
        pad_token_id=tokenizer.eos_token_id if pad_token is None else pad_token,
        padding_free=args.padding_free or args.packing,
        pad_to_multiple_of=length_multiple(args),
        segment_multiple=chunks,
    )
    if len(train) == 0:
        raise UserError("--dataset: no row is left to train on")
    return TrainingData(train, validation, collate, longest, _train_iters(len(train), args), args)


def _train_iters(rows: int, args: Any) -> int:
    """The smaller of --train_iters and what --max_epochs allow."""
    if args.max_epochs is None:
        return int(args.train_iters)
    iters = train_iters(rows, args.max_epochs, args.global_batch_size)
    return min(iters, args.train_iters or iters)
