"""A run's checkpoints: which one it starts from, what is removed before and after a save."""

import shutil
from pathlib import Path
from typing import Any

import torch

from swiftmeg import checkpoint, distributed
from swiftmeg.checkpoint import folder_name
from swiftmeg.observer import Observer
from swiftmeg.trust import Untrusted


def settle_start(args: Any, note: str | None) -> None:
    """Check the content of the checkpoint to continue, or find an older one; collective.

    Each rank reads its share of the files. `note` says what was found before there were ranks;
    the first rank prints it, and what is found now.
    """
    flag, named = f"--{args.continued}", getattr(args, args.continued)
    if named is not None:
        folder = Path(named)
        while fault := _damage(folder, args.ckpt_step):
            broken = args.ckpt_step or _tracked(folder)
            args.ckpt_step, note = checkpoint.fall_back(flag, named, broken, fault)
    if note and distributed.on_rank_zero():
        print(f"warning: {note}", flush=True)


def nothing_left(args: Any, train_iters: int) -> str | None:
    """What to say where the run that is continued has made all its steps, else None."""
    flag, named = f"--{args.continued}", getattr(args, args.continued)
    if named is None or args.finetune:
        return None
    made = args.ckpt_step or _tracked(Path(named))
    if made is None or made < train_iters:
        return None
    return (
        f"{flag} {named} has made {made} steps and this run has {train_iters}: nothing is left to "
        "train; raise --train_iters or --max_epochs, or start anew by --finetune true"
    )


def _tracked(folder: Path) -> int | None:
    word = checkpoint.read_tracker(folder)
    return None if word == "release" else word


def _damage(folder: Path, step: int | None) -> str | None:
    """The first fault that any rank finds in an iteration; Untrusted where one finds code."""
    name = checkpoint.read_iteration(folder) if step is None else folder_name(step)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: str | Untrusted | None
    try:
        found = checkpoint.damaged(folder / name, rank, world)
    except Untrusted as error:
        found = error
    faults = [fault for fault in distributed.gathered(found) if fault]
    for fault in faults:
        if isinstance(fault, Untrusted):
            raise fault
    return str(faults[0]) if faults else None


def keep_random_state(megatron: Any, saved: Any) -> None:
    """Do not load random states of another number of data-parallel ranks: seed anew, and say so.

    They are saved for every data-parallel rank, whose dropout must differ and whose draws depend on
    the lengths of the rows that it gets.
    """
    per_rank = getattr(saved, "data_parallel_random_init", False)
    ranks = getattr(saved, "data_parallel_size", 1) if per_rank else 1
    if megatron.no_load_rng or megatron.finetune or ranks == megatron.data_parallel_size:
        return
    megatron.no_load_rng = True
    if distributed.on_rank_zero():
        print(
            f"the checkpoint holds random states of {ranks} data-parallel ranks, and these are "
            f"{megatron.data_parallel_size}: they start from --seed",
            flush=True,
        )


class CheckpointFolder(Observer):
    """The folder that a run saves to: makes room in it, and holds it to --save_total_limit."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder = folder
        self.limit = limit

    def before_save(self, iteration: int) -> None:
        if distributed.on_rank_zero():
            checkpoint.make_room(self.folder, iteration)
        distributed.barrier()

    def completed(self, iteration: int) -> None:
        if self.limit is None:
            return
        for old in checkpoint.surplus(self.folder, iteration, self.limit):
            checkpoint.remove(self.folder / folder_name(old))
            shutil.rmtree(hf_folder(self.folder, old), ignore_errors=True)


def hf_folder(folder: Path, iteration: int) -> Path:
    """Where the Hugging Face form of `iteration` goes."""
    return folder / f"{folder_name(iteration)}-hf"
