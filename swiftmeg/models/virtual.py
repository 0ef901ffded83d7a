"""The model of any rank of any layout, in one process: on the meta device, without its peers.

Nothing is allocated and nothing is sent, so the layout of a whole cluster can be looked at on a
laptop: process groups are torch's fake ones, which know their sizes and ranks and no more.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from swiftmeg.models.build import model_config

META = torch.device("meta")


@contextlib.contextmanager
def seat(args: Any, rank: int) -> Iterator[ProcessGroupCollection]:
    """Make this process believe that it is `rank` of the job that `args` describes.

    `args` is Megatron's namespace; the process must belong to no job.
    """
    torch.distributed.init_process_group(
        "fake", rank=rank, world_size=args.world_size, store=FakeStore()
    )
    try:
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        )
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _nothing_allocated() -> Iterator[None]:
    """Put every tensor on the meta device, also where Megatron names the current GPU."""
    current = torch.cuda.current_device
    torch.cuda.current_device = lambda: META  # type: ignore[assignment,return-value]
    try:
        with META:
            yield
    finally:
        torch.cuda.current_device = current


def build_chunks(args: Any, hf_config: Any, groups: ProcessGroupCollection) -> list[GPTModel]:
    """The bare model chunks of the rank whose `seat` this process has, on the meta device."""
    config = model_config(args, hf_config)
    config.transformer.perform_initialization = False
    config.finalize()
    builder = config.get_builder_cls()(config)
    count = args.virtual_pipeline_model_parallel_size
    stages = [None] if count is None else range(count)
    with _nothing_allocated():
        models = [builder.build_model(groups, vp_stage=stage) for stage in stages]
    for hook in config.pre_wrap_hooks:
        models = hook(models)
    return models
