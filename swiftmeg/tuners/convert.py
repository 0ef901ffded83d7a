"""swift export with adapters: merged into a model's weights, or written as a PEFT folder."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from swiftmeg import distributed, platform
from swiftmeg.args.adapter_config import RESIDUAL_STARTS
from swiftmeg.args.check import check_layout
from swiftmeg.args.resolve import ARGS_FILE, describe, read_args_file, write_args_file
from swiftmeg.args.tuner import ADAPTER, STARTS, LoraArguments
from swiftmeg.checkpoint import check_checkpoint
from swiftmeg.errors import UserError
from swiftmeg.export.convert import check_target, parse_size, unfinished_folder
from swiftmeg.models.hf import HFModel
from swiftmeg.tuners.peft_reader import read_adapters
from swiftmeg.tuners.tables import settle_tables, tokenizer_files


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
    base, changes = model, ""
    if args.adapters:
        peft = read_adapters(adapters, model)
        model = settle_tables(*peft, model)
        changes = _changed_tables(args, model, base)
    platform.prepare()

    from swiftmeg.export.chat_template import write_chat_template
    from swiftmeg.export.hf_writer import save_hf
    from swiftmeg.export.model import build_model, save_mcore
    from swiftmeg.export.precision import compare_logits
    from swiftmeg.models.build import dims_of
    from swiftmeg.tuners.peft_folder import save_peft

    distributed.initialize()
    first = distributed.on_rank_zero()
    if first:
        print(describe(args, sources), flush=True)
        if changes:
            print(f"with the adapter's tables config.json says {changes}", flush=True)
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
    if args.mcore_adapters:
        weights = _merge_trained(models, adapters, args, model, megatron)
    else:
        weights = _merge_folder(models, peft, args, model, megatron)
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
            if first:
                for path in tokenizer_files(adapters):
                    shutil.copyfile(path, unfinished / path.name)
        if args.test_convert_precision and args.to_hf:
            plan = model.family.plan(model.config)
            compare_logits(models, unfinished, model.tokenizer(), dims.vocab_size, plan)
        if args.to_mcore:
            save_mcore(models, unfinished, weights)
        if first:
            _write_args(unfinished, adapters, args, sources)
            if args.to_hf:
                write_chat_template(unfinished, model, args)
    distributed.barrier()
    distributed.shut_down()


def _changed_tables(args: Any, model: HFModel, base: HFModel) -> str:
    """What the adapter changes in config.json, in words; empty if nothing.

    UserError where a Megatron checkpoint would name a model that says otherwise.
    """
    both = {key: model.config.get(key) for key in ("vocab_size", "tie_word_embeddings")}
    said = ", ".join(
        f"{key} {value}" for key, value in both.items() if value != base.config.get(key)
    )
    if said and args.to_mcore:
        raise UserError(
            f"--adapters {args.adapters[0]} --to_mcore true: the merged model has {said}, unlike "
            f"--model {args.model}: merge it with --to_hf true first, then convert the result"
        )
    return said


def check_base(folder: Path, args: Any, model: HFModel, megatron: Any) -> None:
    """UserError unless a LoRA checkpoint, and the weights that it stands beside, are of `model`."""
    from swiftmeg.export.model import check_same_model, saved_arguments

    check_same_model(megatron, saved_arguments(folder), model, "--mcore_adapters", folder)
    if args.mcore_model is not None:
        base = Path(args.mcore_model)
        check_same_model(megatron, saved_arguments(base), model, "--mcore_model", base)


def attach_trained(models: list[Any], folder: Path, args: Any) -> None:
    """Put the adapters of a LoRA checkpoint beside the weights, which need no values yet."""
    from swiftmeg.export.model import load_weights

    _attach(models, folder, args)
    load_weights(models, folder)


def _attach(models: list[Any], folder: Path, args: Any) -> None:
    from megatron.core.utils import unwrap_model

    from swiftmeg.tuners.adapters import attach

    trained: Any = SimpleNamespace(**_training_args(folder, args))
    attach(unwrap_model(models), trained, seed=0)


def _training_args(folder: Path, args: Any) -> dict[str, Any]:
    """The args.json of a LoRA checkpoint, with the base that this command uses."""
    saved = asdict(LoraArguments()) | read_args_file(folder)
    return saved | {"load": args.mcore_model, "model": args.model}


def _merge_trained(
    models: list[Any], folder: Path, args: Any, model: HFModel, megatron: Any
) -> Any:
    """The weights with the adapters of a LoRA checkpoint added.

    With --test_convert_precision they are in `models`, and were compared with the adapters.
    """
    from megatron.core.utils import unwrap_model

    from swiftmeg.export.hf_files import HFWeights
    from swiftmeg.export.hf_reader import HFSupply
    from swiftmeg.export.lazy_weights import OnDemand, Supply, fill_all
    from swiftmeg.export.mcore_reader import CheckpointSupply
    from swiftmeg.export.model import load_weights
    from swiftmeg.export.precision import mcore_logits
    from swiftmeg.models.build import dims_of
    from swiftmeg.tuners.merge import Merging, merge
    from swiftmeg.tuners.residual import ResidualWeights

    check_base(folder, args, model, megatron)
    dims = dims_of(megatron)
    start = _training_args(folder, args)["init_lora_weights"]
    residual = start in RESIDUAL_STARTS
    base: Supply | None = None
    if args.mcore_model is not None:
        if residual:
            raise UserError(
                f"--mcore_model {args.mcore_model}: an adapter with init_lora_weights {start} "
                "needs the Hugging Face weights that it was made from: name them by --model"
            )
        base = CheckpointSupply(models, Path(args.mcore_model))
    _attach(models, folder, args)
    if base is None:
        plain = HFWeights(model.folder, model.config)
        weights = ResidualWeights(model, models, start) if residual else plain
        base = HFSupply(weights, model.family, model.config, dims)
    if not args.test_convert_precision:
        load_weights(models, folder)
        return OnDemand(models, Merging(unwrap_model(models), base))
    fill_all(models, base)
    load_weights(models, folder)
    ids = _sample(model)
    beside = mcore_logits(models, ids, dims.vocab_size)

    def add() -> None:
        _say(merge(unwrap_model(models)))

    return _compared(models, ids, dims.vocab_size, add, lambda: beside)


def _merge_folder(models: list[Any], peft: Any, args: Any, model: HFModel, megatron: Any) -> Any:
    """The HF weights with a PEFT folder added.

    With --test_convert_precision they are in `models`, and were compared with PEFT's model.
    """
    from swiftmeg.export.lazy_weights import OnDemand, fill_all
    from swiftmeg.models.build import dims_of
    from swiftmeg.tuners.merged_weights import MergedSupply, MergedWeights
    from swiftmeg.tuners.peft_folder import peft_logits

    config, adapters = peft
    dims = dims_of(megatron)
    supply = MergedSupply(MergedWeights(model, config, adapters), adapters, model, dims)
    if not args.test_convert_precision:
        return OnDemand(models, supply)
    ids = _sample(model)
    return _compared(
        *(models, ids, dims.vocab_size),
        lambda: fill_all(models, supply),
        lambda: peft_logits(model.folder, config.folder, ids, dims.vocab_size),
    )


def _sample(model: HFModel) -> Any:
    import torch

    from swiftmeg.export.precision import sample_ids

    return sample_ids(model.tokenizer()).to(torch.cuda.current_device())


def _compared(
    models: list[Any],
    ids: Any,
    vocab_size: int,
    merge: Callable[[], None],
    reference: Callable[[], Any],
) -> Any:
    """`models` merged in fp32 by `merge`, compared with the adapters, then rounded; collective."""
    from megatron.core.utils import unwrap_model

    from swiftmeg.export.lazy_weights import Whole
    from swiftmeg.export.precision import judge, mcore_logits

    for chunk in unwrap_model(models):
        chunk.float()
    merge()
    merged = mcore_logits(models, ids, vocab_size)  # which rounds the weights to their dtype
    judge(merged, reference, "the merged model and the model with its adapters beside")
    return Whole()


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
