"""Every patch of Megatron, each with its reason and the condition under which it can go."""

import contextlib
import io
import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from swiftmeg import platform
from swiftmeg.checkpoint import TRACKER, read_tracker, write_tracker
from swiftmeg.orphans import die_with
from swiftmeg.unpickling import load_item, read_index


def apply() -> None:
    """Install the patches that every command needs; calling it again changes nothing."""
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import arguments, initialize, training

    # The wheel ships helpers_cpp compiled but no Makefile, and compile_helpers() runs `make` and
    # exits the process when that fails. Can go when upstream skips an existing library.
    dataset_utils.compile_helpers = lambda: None
    # A save starts a manager process per rank for the results of its writers, although these are
    # threads unless the save is asynchronous: seconds lost, and an orphan where a rank is killed.
    # Can go when upstream starts it for asynchronous saves only.
    filesystem_async._results_queue = queue.Queue()
    # Prints about 900 lines. The values that matter are in args.json, with their sources, and all
    # are in the checkpoint. Can go when upstream has a switch for it.
    arguments._print_args = lambda title, args: None
    # Print a block of estimates at each early log line; the lines state the peak. Can go likewise.
    training.report_theoretical_memory = training.report_memory = lambda *args, **kwargs: None
    _train_bias_of_frozen_weight()
    _replace_tracker_in_one_step()
    _read_tracker_alone()
    _unpickle_known_classes()
    _resume_torch_adam()
    _build_predictions_of_own_layers()
    _train_at_own_rates()
    _resume_sgd()
    _update_in_few_launches()
    if not platform.has_cuda():
        # initialize_megatron asserts CUDA unless told otherwise, and pretrain() does not pass the
        # switch on. Can go when pretrain() takes `allow_no_cuda`.
        original = initialize.initialize_megatron

        def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **{"allow_no_cuda": True, **kwargs})

        if training.initialize_megatron is original:
            training.initialize_megatron = initialize_megatron
        # Warms up kernels of torch's compiler, which is off without CUDA, on buffers of
        # seq_length x ffn_hidden_size. Can go when it asks whether there is a compiler.
        training.set_jit_fusion_options = lambda *args, **kwargs: None


def _train_bias_of_frozen_weight() -> None:
    """Give the bias of a column-parallel layer its gradient where the layer's weight is frozen.

    Megatron's function for frozen weights adds the bias and returns no gradient for it. Can go when
    LinearWithFrozenWeight.backward() does.
    """
    from megatron.core.tensor_parallel import layers

    linear = unpatched(layers, "linear_with_frozen_weight")

    def linear_with_frozen_weight(
        input: Any, weight: Any, bias: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if bias is None or not bias.requires_grad:
            return linear(input, weight, bias, *args, **kwargs)
        return linear(input, weight, None, *args, **kwargs) + bias

    linear_with_frozen_weight._original = linear  # type: ignore[attr-defined]
    layers.linear_with_frozen_weight = linear_with_frozen_weight


def accumulate_by(add_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]) -> None:
    """Let Megatron's linear layers accumulate weight gradients by `add_product(buffer, grad, x)`.

    They look for a module of apex, which is not on PyPI. Can go when they use torch's product.
    """
    from megatron.core.tensor_parallel import layers

    def accumulate(x: torch.Tensor, grad: torch.Tensor, buffer: torch.Tensor) -> None:
        add_product(buffer, grad, x)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
    )
    layers._grad_accum_fusion_available = True


def _update_in_few_launches() -> None:
    """Let gradient norm, clipping and Adam go over all parameters at once on GPUs.

    Without TransformerEngine and apex Megatron goes from parameter to parameter, with a launch and
    a wait for the GPU for each. Can go when it uses torch's functions for lists.
    """
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.training import training

    if distrib_optimizer.HAVE_APEX_OR_TE or not platform.has_cuda():
        return

    def norm(chunk: int, flag: Any, lists: list[list[torch.Tensor]], *args: Any) -> Any:
        norms = torch.stack(list(torch._foreach_norm(lists[0])))
        return torch.linalg.vector_norm(norms).reshape(1), None

    def scale(chunk: int, flag: Any, lists: list[list[torch.Tensor]], factor: float) -> None:
        source, target = lists
        if source is not target:
            torch._foreach_copy_(target, source)
        torch._foreach_mul_(target, factor)

    clip_grads.l2_norm_impl = norm
    clip_grads.multi_tensor_scale_impl = scale
    make = unpatched(training, "get_megatron_optimizer")

    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        for each in getattr(optimizer, "chained_optimizers", [optimizer]):
            _fuse(each.optimizer)
        return optimizer

    get_megatron_optimizer._original = make  # type: ignore[attr-defined]
    training.get_megatron_optimizer = get_megatron_optimizer


def _fuse(optimizer: Any) -> None:
    """Let torch's Adam update all parameters by one kernel."""
    if isinstance(optimizer, torch.optim.Adam):
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


def store_layers_by_number() -> None:
    """Give every layer entries of its own in checkpoints that are written from now on.

    Megatron stores a parameter of all layers as one entry with an axis of layers, which cannot be
    written where only some layers have it: an optimizer's state of a model that is frozen in part.
    How a checkpoint was written stands in it and decides how it is read. Can go when upstream drops
    the axis, as a comment in TransformerBlock.sharded_state_dict() announces.
    """
    from megatron.training import checkpointing

    build = unpatched(checkpointing, "_build_sharded_state_dict_metadata")

    def metadata(*args: Any, **kwargs: Any) -> Any:
        return {**build(*args, **kwargs), "non_homogeneous_layers": True}

    metadata._original = build  # type: ignore[attr-defined]
    checkpointing._build_sharded_state_dict_metadata = metadata


def _resume_torch_adam() -> None:
    """Let the distributed optimizer load a checkpoint into torch's Adam.

    Without TransformerEngine and apex, where Adam keeps a step count with each parameter, it
    asserts that an optimizer has made a step before it loads and has a parameter on every rank
    (which that of experts has not on a stage of dense layers), and looks for the count where the
    moments are.
    Can go when a run resumes without this.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    save = unpatched(optimizer_class, "state_dict")
    fill = unpatched(optimizer_class, "_set_main_param_and_optimizer_states")

    def state_dict(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    moments = {
                        key: torch.zeros_like(parameter) for key in self.optimizer_state_keys
                    }
                    step = torch.zeros((), device=parameter.device)
                    self.optimizer.state[parameter] = {"step": step, **moments}
        state = self.optimizer.state
        steps = [float(each["step"]) for each in state.values()]
        step = torch.tensor(max(steps, default=0.0), device=torch.cuda.current_device())
        torch.distributed.all_reduce(step, op=torch.distributed.ReduceOp.MAX)
        if not steps:
            state["no parameter here"] = {"step": step}
        try:
            return save(self)
        finally:
            state.pop("no parameter here", None)

    def set_states(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        fill(self, parameter, {"step": None, **tensors})

    state_dict._original = save  # type: ignore[attr-defined]
    set_states._original = fill  # type: ignore[attr-defined]
    optimizer_class.state_dict = state_dict
    optimizer_class._set_main_param_and_optimizer_states = set_states


def _train_at_own_rates() -> None:
    """Let a run that continues a checkpoint keep the rates of its parameter groups.

    Megatron looks for each group in the checkpoint by what is said of it, learning rates included,
    ends where one has changed, and takes the rest from there: betas, epsilon, momentum. Only the
    count of steps is the optimizer's state. It gives all parameters one tensor as their count,
    which torch's Adam increments for each of them. Can go when groups are matched without their
    rates, and counts are copied.
    """
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    distributed = distrib_optimizer.DistributedOptimizer
    load = unpatched(distributed, "load_state_dict")
    match = unpatched(MegatronOptimizer, "_filter_and_reorder_param_groups")

    def load_state_dict(self: Any, state: Any) -> None:
        saved = state["optimizer"]
        groups = _own_groups(self.optimizer.param_groups, saved["param_groups"])
        load(self, {**state, "optimizer": {**saved, "param_groups": groups}})
        if not distrib_optimizer.HAVE_APEX_OR_TE:
            for each in self.optimizer.state.values():
                each["step"] = each["step"].clone()

    def matched(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> Any:
        return match(current, _own_groups(current, saved))

    load_state_dict._original = load  # type: ignore[attr-defined]
    matched._original = match  # type: ignore[attr-defined]
    distributed.load_state_dict = load_state_dict
    MegatronOptimizer._filter_and_reorder_param_groups = staticmethod(matched)


def _own_groups(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of this run, with the order of parameters and the count of steps of the saved."""
    steps = [group["step"] for group in saved if "step" in group]
    counted = {"step": max(steps)} if steps else {}
    places = [{"params": group["params"]} if "params" in group else {} for group in saved]
    places += [{}] * (len(current) - len(saved))
    return [group | counted | place for group, place in zip(current, places, strict=False)]


def _resume_sgd() -> None:
    """Let a run that trains by SGD be continued.

    Megatron has no function that makes SGD's state, which it calls before it loads a checkpoint.
    Can go when it has.
    """
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    start = unpatched(MegatronOptimizer, "__init__")

    def init(self: Any, optimizer: Any, config: Any, init_state_fn: Any = None) -> None:
        start(self, optimizer, config, init_state_fn or _start_momentum)

    init._original = start  # type: ignore[attr-defined]
    MegatronOptimizer.__init__ = init


def _start_momentum(optimizer: Any, config: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def group_parameters(overrides: Callable[[Any], dict[Any, Any]]) -> None:
    """Train the parameters that `overrides(optimizer's config)` names with what it says of them.

    Added to Megatron's own groups. Can go when pretrain() takes `config_overrides`.
    """
    from megatron.training import training

    original = unpatched(training, "get_megatron_optimizer_config")

    def get_megatron_optimizer_config(args: Any) -> tuple[Any, dict[Any, Any]]:
        config, groups = original(args)
        return config, groups | overrides(config)

    get_megatron_optimizer_config._original = original  # type: ignore[attr-defined]
    training.get_megatron_optimizer_config = get_megatron_optimizer_config


def _build_predictions_of_own_layers() -> None:
    """Let the model builder make prediction modules from the config's `prediction_spec(vp_stage)`.

    It makes them of Megatron's own layers, whatever the layers of the decoder are. Can go when it
    takes the decoder's.
    """
    from megatron.training.models import gpt

    gpt.mtp_block_spec = lambda config, layers, vp_stage=None: config.prediction_spec(vp_stage)


def rotate_packs(rotate: Callable[..., torch.Tensor]) -> None:
    """Apply rotary embeddings to the heads of a pack with `rotate`, where there is a GPU.

    Megatron goes from sample to sample, with a dozen small kernels for each, and waits for the GPU
    to learn how long they are, for queries and keys of every layer. Can go when it does not. On
    CPUs that is faster than all samples at once.
    """
    from megatron.core.models.common.embeddings import rope_utils

    if platform.has_cuda():
        rope_utils._apply_rotary_pos_emb_thd = rotate


def attach_prediction_losses(attach: Callable[..., Any]) -> None:
    """Let GPTModel add the losses of prediction modules to the objective with `attach`.

    Its own function averages them over each micro-batch of each context-parallel rank, so that the
    gradients depend on both. Can go when it divides by the tokens of the global batch.
    """
    from megatron.core.models.gpt import gpt_model

    gpt_model.process_mtp_loss = attach


def _replace_tracker_in_one_step() -> None:
    """Let save_checkpoint() replace the tracker instead of emptying it and writing it anew.

    A process killed between the two leaves an empty file. Can go when upstream renames.
    """
    from megatron.core import msc_utils
    from megatron.training import checkpointing

    checkpointing.maybe_msc = _Storage(msc_utils.maybe_msc)


def _read_tracker_alone() -> None:
    """Let Megatron find the iteration to load where this project does, or where --ckpt_step says.

    Its own reader ends the process with exit code 0 at a word that is no number, and takes the
    iteration from --ckpt_step but the kind, `release`, from the tracker. Can go when it does not.
    """
    from megatron.training import checkpointing, get_args

    def read_metadata(file: str) -> tuple[int, bool]:
        if step := get_args().ckpt_step:
            return step, False
        word = read_tracker(Path(file).parent)
        return (0, True) if word == "release" else (word, False)

    checkpointing.read_metadata = read_metadata


def _unpickle_known_classes() -> None:
    """Let torch's reader of checkpoints make objects of known classes only.

    It unpickles the index and all that is no tensor, with whatever code is in them. What a command
    reads has been looked at before; this holds for any reader in Megatron. Can go when torch's
    reader has `weights_only`.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint._traverse import set_element
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import StorageMeta

    def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        index = read_index(Path(self._get_metadata_path(kwargs.get("rank"))))
        meta = index.storage_meta = getattr(index, "storage_meta", None) or StorageMeta()
        meta.load_id = self.load_id
        return index

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        item = load_item(value, Path(name))
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], item)
        else:
            self.state_dict[name] = item

    FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]


def write_in_background() -> None:
    """Give asynchronous saves a queue that their processes can reach, in one that ends with us.

    Megatron's own manager outlives a rank that is killed. Can go when it does not.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_die_with_parent)
    filesystem_async._results_queue = manager.Queue()
    filesystem_async._results_queue.manager = manager  # collected, it would end the process


def _die_with_parent() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole group, it is the rank's to obey
    die_with()


class _Storage:
    """Megatron's file access, with trackers written by `swiftmeg.checkpoint`."""

    on_complete: Callable[[int], None] | None = None
    """Called with every iteration that is complete, on the rank that writes the tracker."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def open(self, path: str, mode: str = "r") -> Any:
        if mode == "w" and Path(path).name == TRACKER:
            return self._tracker(Path(path).parent)
        return self._storage.open(path, mode)

    @contextlib.contextmanager
    def _tracker(self, folder: Path) -> Iterator[Any]:
        text = io.StringIO()
        yield text
        word = text.getvalue()
        write_tracker(folder, word)
        if self.on_complete is not None and word.isdecimal():
            self.on_complete(int(word))


def unpatched(module: Any, name: str) -> Any:
    """The upstream function behind an earlier patch, so that patches of two runs do not pile up."""
    function = getattr(module, name)
    return getattr(function, "_original", function)


@contextlib.contextmanager
def only_own_groups() -> Iterator[None]:
    """Let initialize_model_parallel() make only the process groups that this rank is in.

    A real job must make all of them on every rank; alone, with stand-ins for groups, the thousands
    of others would cost minutes. Can go when they are made lazily.
    """
    from megatron.core import parallel_state

    original = parallel_state.create_group

    def create_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        own = torch.distributed.get_rank() in ranks
        return original(ranks, *args, **kwargs) if own else None

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = original
