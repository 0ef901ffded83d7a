"""The model of any rank of any layout, in one process: on the meta device, without its peers.

Nothing is allocated and nothing is sent, so the layout of a whole cluster can be looked at on a
laptop: process groups are torch's fake ones, which know their sizes and ranks and no more.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models import GPTModelConfig
from megatron.training.models.dist_utils import build_virtual_pipeline_stages
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from swiftmeg import upstream
from swiftmeg.models.build import model_config


def describe(args: Any, hf_config: Any) -> GPTModelConfig:
    """The model that `build_chunks` builds; `args` is a validated namespace of native layers."""
    config = model_config(args, hf_config)
    config.transformer.perform_initialization = False
    config.finalize()
    return config


@contextlib.contextmanager
def seat(args: Any, rank: int) -> Iterator[ProcessGroupCollection]:
    """Make this process believe that it is `rank` of the job that `args` describes.

    `args` is Megatron's namespace; the process must belong to no job.
    """
    torch.distributed.init_process_group(
        "fake", rank=rank, world_size=args.world_size, store=FakeStore()
    )
    try:
        with upstream.only_own_groups():
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
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_chunks(config: GPTModelConfig, groups: ProcessGroupCollection) -> list[GPTModel]:
    """The bare model chunks of the rank whose `seat` this process has, on the meta device."""
    with _OnMeta():
        models: list[GPTModel] = build_virtual_pipeline_stages(
            config.get_builder_cls()(config).build_model,
            groups,
            config.transformer.virtual_pipeline_model_parallel_size,
            ModelType.encoder_or_decoder,
        )
    for hook in config.pre_wrap_hooks:
        models = hook(models)
    return models


_FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "tensor",
        "as_tensor", "arange", "linspace", "eye", "empty_like", "zeros_like", "ones_like",
        "full_like",
    )
)  # fmt: skip


class _OnMeta(TorchFunctionMode):
    """Every new tensor is one of the meta device, whatever device the code names."""

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
