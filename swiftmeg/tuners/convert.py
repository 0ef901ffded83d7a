"""swift export with adapters: merged into a model's weights, or written as a PEFT folder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from swiftmeg import distributed, platform
from swiftmeg.args.check import check_layout
from swiftmeg.args.resolve import ARGS_FILE, describe, read_args_file, write_args_file
from swiftmeg.args.tuner import ADAPTER, STARTS
from swiftmeg.checkpoint import check_checkpoint
from swiftmeg.errors import UserError
from swiftmeg.export.convert import check_target, parse_size, unfinished_folder
from swiftmeg.models.hf import HFModel


def check_adapters(args: Any) -> tuple[Path, Path]:
    """Find what is wrong before anything heavy starts; returns the adapters and the target."""
    if args.mcore_adapters and args.adapters:
        raise UserError("--mcore_adapters and --adapters exclude each other: drop one")
    flag = "mcore_adapters" if args.mcore_adapters else "adapters"
    named = getattr(args, flag)
    if len(named) > 1:
        raise UserError(f"--{flag} {' '.join(named)}: one adapter can be converted: name one")
    if args.to_mcore and args.to_hf:
        raise UserError("pass either --to_mcore true or --to_hf true, one of them")
    if flag == "adapters":
        if not args.merge_lora:
            raise UserError("--adapters needs --merge_lora true: set it or drop --adapters")
        args.to_hf = not args.to_mcore
        folder = Path(named[0]).expanduser().resolve()
    else:
        if not (args.to_mcore or args.to_hf):
            raise UserError("--mcore_adapters needs --to_hf true or --to_mcore true: set one")
        if args.merge_lora is None:
            args.merge_lora = True
        if not args.merge_lora and args.to_mcore:
            raise UserError("--merge_lora false needs --to_hf true: it writes a PEFT folder")
        folder = check_checkpoint("--mcore_adapters", named[0])
    if args.mcore_model is not None:
        if flag == "adapters":
            raise UserError("--adapters are merged into --model: drop --mcore_model")
        args.mcore_model = str(check_checkpoint("--mcore_model", args.mcore_model))
    ending = "merged" if args.merge_lora else "peft"
    return folder, check_target(args, f"{folder.name}-{ending}")


def convert(args: Any, sources: dict[str, str], model: HFModel) -> None:
    """Run `swift export` with --mcore_adapters or --adapters, as resolved."""
    adapters, target = check_adapters(args)
    check_layout(args, model)
    max_shard_bytes = parse_size(args.max_shard_size)
    if args.torch_dtype is None:
        args.torch_dtype, sources["torch_dtype"] = model.dtype, "config.json"
    args.model, args.output_dir = model.named, str(target)
    platform.prepare()
    import torch

    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.model import build_model, save_mcore
    from swiftmeg.export.precision import RELATIVE_BOUND, hf_logits, judge, mcore_logits
    from swiftmeg.models.build import dims_of
    from swiftmeg.tuners.peft_folder import save_peft

    distributed.initialize()
    first = distributed.on_rank_zero()
    if first:
        print(describe(args, sources), flush=True)
    megatron, models = build_model(args, model)
    dims = dims_of(megatron)
    if not args.merge_lora:
        check_base(adapters, args, model, megatron)
        attach_trained(models, adapters, args)
        trained = SimpleNamespace(**_training_args(adapters, args))
        save_peft(models, target, trained, model, dims)
        if first:
            print(f"written to {target}", flush=True)
        distributed.shut_down()
        return
    merge = _merge_trained if args.mcore_adapters else _merge_folder
    weights, logits, ids = merge(models, adapters, args, model, megatron)
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
            live = mcore_logits(models, ids, dims.vocab_size) if args.to_mcore else None
            judge(
                logits,
                lambda: hf_logits(unfinished, ids) if live is None else live,
                "the merged model and the model with its adapters beside",
                # A sum is rounded to the dtype of the weights; the adapter alone was not.
                RELATIVE_BOUND + 10 * torch.finfo(megatron.params_dtype).eps,
            )
        if args.to_mcore:
            save_mcore(models, unfinished, weights)
        if first:
            _write_args(unfinished, adapters, args, sources)
    distributed.barrier()
    distributed.shut_down()


def check_base(folder: Path, args: Any, model: HFModel, megatron: Any) -> None:
    """UserError unless a LoRA checkpoint, and the weights that it stands beside, are of `model`."""
    from swiftmeg.export.model import check_same_model, saved_arguments

    check_same_model(megatron, saved_arguments(folder), model, "--mcore_adapters", folder)
    if args.mcore_model is not None:
        base = Path(args.mcore_model)
        check_same_model(megatron, saved_arguments(base), model, "--mcore_model", base)


def attach_trained(models: list[Any], folder: Path, args: Any) -> None:
    """Put the adapters of a LoRA checkpoint beside the weights, which need no values yet."""
    from megatron.core.utils import unwrap_model

    from swiftmeg.export.model import load_weights
    from swiftmeg.tuners.adapters import attach

    trained: Any = SimpleNamespace(**_training_args(folder, args))
    attach(unwrap_model(models), trained, seed=0)
    load_weights(models, folder)


def _training_args(folder: Path, args: Any) -> dict[str, Any]:
    """The args.json of a LoRA checkpoint, with the base that this command uses."""
    saved = read_args_file(folder)
    return saved | {"load": args.mcore_model, "model": args.model}


def _merge_trained(
    models: list[Any], folder: Path, args: Any, model: HFModel, megatron: Any
) -> tuple[Any, Any, Any]:
    """The weights with the adapters of a LoRA checkpoint added.

    With --test_convert_precision also logits with adapters beside the weights, and their ids.
    """
    import torch
    from megatron.core.utils import unwrap_model

    from swiftmeg.export.hf_files import HFWeights
    from swiftmeg.export.hf_reader import HFSupply
    from swiftmeg.export.lazy_weights import OnDemand, Supply, Whole, fill_all
    from swiftmeg.export.mcore_reader import CheckpointSupply
    from swiftmeg.export.precision import mcore_logits, sample_ids
    from swiftmeg.models.build import dims_of
    from swiftmeg.tuners.merge import Merging, merge

    check_base(folder, args, model, megatron)
    dims = dims_of(megatron)
    base: Supply
    if args.mcore_model is None:
        hf_weights = HFWeights(model.folder, model.config)
        base = HFSupply(hf_weights, model.family, model.config, dims)
    else:
        base = CheckpointSupply(models, Path(args.mcore_model))
    if not args.test_convert_precision:
        attach_trained(models, folder, args)
        return OnDemand(models, Merging(unwrap_model(models), base)), None, None
    fill_all(models, base)
    attach_trained(models, folder, args)
    ids = sample_ids(model.tokenizer()).to(torch.cuda.current_device())
    logits = mcore_logits(models, ids, dims.vocab_size)
    _say(merge(unwrap_model(models)))
    return Whole(), logits, ids


def _merge_folder(
    models: list[Any], folder: Path, args: Any, model: HFModel, megatron: Any
) -> tuple[Any, Any, Any]:
    """The HF weights with a PEFT folder added; with the test also PEFT's own logits, and ids."""
    import torch

    from swiftmeg.export.hf_reader import HFSupply
    from swiftmeg.export.lazy_weights import OnDemand, Whole, fill_all
    from swiftmeg.export.precision import sample_ids
    from swiftmeg.models.build import dims_of
    from swiftmeg.tuners.merge import MergedWeights
    from swiftmeg.tuners.peft_folder import peft_logits
    from swiftmeg.tuners.peft_format import read_folder

    merged = MergedWeights(model, *read_folder(folder))
    _say(merged.report())
    supply = HFSupply(merged, model.family, model.config, dims_of(megatron))
    if not args.test_convert_precision:
        return OnDemand(models, supply), None, None
    ids = sample_ids(model.tokenizer()).to(torch.cuda.current_device())
    logits = peft_logits(model.folder, folder, ids)
    fill_all(models, supply)
    return Whole(), logits, ids


def _say(line: str) -> None:
    if distributed.on_rank_zero():
        print(line, flush=True)


def _write_args(folder: Path, adapters: Path, args: Any, sources: dict[str, str]) -> None:
    """A merged model keeps the args.json of its training run, but is no adapter any more."""
    saved = read_args_file(adapters)
    if not saved or not args.to_hf:
        write_args_file(folder, args, sources)
        return
    import json

    kept = {name: value for name, value in saved.items() if name not in (*ADAPTER, *STARTS)}
    (folder / ARGS_FILE).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
