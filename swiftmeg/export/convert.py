"""swift export: whole checkpoints between the two worlds, in any number of processes."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swiftmeg import distributed, platform
from swiftmeg.args.check import check_layout, check_writable
from swiftmeg.args.resolve import ARGS_FILE, describe, write_args_file
from swiftmeg.checkpoint import check_checkpoint
from swiftmeg.errors import UserError
from swiftmeg.export.atomic_folder import building
from swiftmeg.models.hf import HFModel

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a file cannot grow."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB; UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--max_shard_size {text!r} is not a size: write e.g. 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def check_export(args: Any, model: HFModel) -> tuple[Path, int]:
    """Find what is wrong before anything heavy starts; return output folder and shard bytes."""
    if args.to_mcore == args.to_hf:
        raise UserError("pass either --to_mcore true or --to_hf true, one of them")
    if args.to_hf and args.mcore_model is None:
        raise UserError("--to_hf true needs --mcore_model: name the Megatron checkpoint")
    if args.to_mcore and args.mcore_model is not None:
        raise UserError("--to_mcore true converts --model; drop --mcore_model")
    if args.to_hf:
        args.mcore_model = str(check_checkpoint("--mcore_model", args.mcore_model))
    name = model.folder.name + "-mcore" if args.to_mcore else Path(args.mcore_model).name + "-hf"
    target = check_target(args, name)
    check_layout(args, model)
    size = parse_size(args.max_shard_size)
    if args.to_mcore:
        from swiftmeg.export.hf_files import HFWeights, check_names

        check_names(model.family, model.config, HFWeights(model.folder, model.config))
    return target, size


def check_target(args: Any, name: str) -> Path:
    """The folder to write, `name` where --output_dir is not given; UserError if it is in use."""
    target = Path(args.output_dir or name).expanduser().resolve()
    check_writable("--output_dir", target)
    if target.is_dir() and any(target.iterdir()) and not args.exist_ok:
        raise UserError(
            f"--output_dir {target} is not empty: name another folder or pass --exist_ok true"
        )
    if target.is_mount():
        raise UserError(
            f"--output_dir {target} is where a file system is mounted, which a complete folder "
            "cannot replace: name a folder inside"
        )
    return target


def convert(args: Any, sources: dict[str, str], model: HFModel) -> None:
    """Run `swift export` as resolved.

    The result is built in a hidden folder and moved to its place last, so that a failed or killed
    conversion never looks like a finished one.
    """
    target, max_shard_bytes = check_export(args, model)
    if args.torch_dtype is None:
        args.torch_dtype, sources["torch_dtype"] = model.dtype, "config.json"
    args.model, args.output_dir = model.named, str(target)
    platform.prepare()
    from swiftmeg.export.chat_template import write_chat_template
    from swiftmeg.export.hf_files import HFWeights
    from swiftmeg.export.hf_reader import HFSupply
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.lazy_weights import OnDemand, Supply, Weights, Whole, fill_all
    from swiftmeg.export.mcore_reader import CheckpointSupply
    from swiftmeg.export.model import build_model, check_same_model, save_mcore, saved_arguments
    from swiftmeg.export.precision import compare_logits
    from swiftmeg.models.build import dims_of

    distributed.initialize()
    first = distributed.on_rank_zero()
    if first:
        print(describe(args, sources), flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    megatron, models = build_model(args, model)
    dims = dims_of(megatron)
    supply: Supply
    if args.to_mcore:
        hf_weights = HFWeights(model.folder, model.config)
        supply = HFSupply(hf_weights, model.family, model.config, dims)
    else:
        folder = Path(args.mcore_model)
        check_same_model(megatron, saved_arguments(folder), model, "--mcore_model", folder)
        supply = CheckpointSupply(models, folder)
    weights: Weights
    if args.test_convert_precision:
        fill_all(models, supply)
        weights = Whole()
    else:
        weights = OnDemand(models, supply)
    with unfinished_folder(target) as unfinished:
        if args.to_hf:
            save_hf(
                models,
                unfinished,
                model.folder,
                model.family,
                model.config,
                dims,
                dtype=megatron.params_dtype,
                max_shard_bytes=max_shard_bytes,
                overrides=model.overrides,
                weights=weights,
            )
        if args.test_convert_precision:
            reference = model.folder if args.to_mcore else unfinished
            config = model.hf_config if args.to_mcore else None
            plan = model.family.plan(model.config)
            compare_logits(models, reference, model.tokenizer(), dims.vocab_size, plan, config)
        if args.to_mcore:
            save_mcore(models, unfinished, weights)
        read = distributed.gathered(supply.bytes_read)
        if first:
            _write_args(unfinished, args, sources)
            if args.to_hf:
                write_chat_template(unfinished, model, args)
            one = f", at most {max(read) / 1e9:.3f} GB by one process" if len(read) > 1 else ""
            print(f"read {sum(read) / 1e9:.3f} GB of weights{one}", flush=True)
    distributed.barrier()
    distributed.shut_down()


@contextlib.contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place if all goes well; collective."""
    first = distributed.on_rank_zero()
    try:
        with building(target, first) as unfinished:
            yield unfinished
        if first:
            print(f"written to {target}", flush=True)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"--output_dir {target}: {os.strerror(error.errno)}: nothing is kept; make room or "
            "name another folder"
        ) from None


def _write_args(folder: Path, args: Any, sources: dict[str, str]) -> None:
    """A model keeps the args.json of the checkpoint that it comes from."""
    trained = Path(args.mcore_model or "") / ARGS_FILE
    if args.to_hf and trained.is_file():
        shutil.copyfile(trained, folder / ARGS_FILE)
    else:
        write_args_file(folder, args, sources)
