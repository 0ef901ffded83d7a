"""Known bugs of such frameworks, each put back by a patch: the matrix must see every one.

A mutation runs on every rank before training. `MUTATIONS` says with which row it is shown.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.matrix.cases import Row


class Mutation(NamedTuple):
    """A bug, what it is in words, and the row that must turn red."""

    apply: Callable[[], None]
    words: str
    row: Row


def _replace(module: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(module, name, make(getattr(module, name)))


def mean_of_means() -> None:
    from swiftmeg.trainers import sft

    def loss_function(weights: Any, losses: Any) -> Any:
        mean = (losses * weights).sum() / weights.sum().clamp(min=1)
        one = torch.ones((), dtype=torch.int)
        return mean, one, {"lm loss": torch.stack([mean.detach(), one.float()])}

    sft.loss_function = loss_function


def train_on_prompts() -> None:
    from swiftmeg.trainers import sft

    _replace(
        sft, "loss_function", lambda f: lambda weights, losses: f(torch.ones_like(weights), losses)
    )


def drop_micro_batches() -> None:
    from swiftmeg.trainers import sft

    calls = []

    def make(original: Any) -> Any:
        def loss_function(weights: Any, losses: Any) -> Any:
            calls.append(1)
            total, count, report = original(weights, losses)
            return (total if len(calls) % 2 else total * 0), count, report

        return loss_function

    _replace(sft, "loss_function", make)


def samples_see_each_other() -> None:
    from swiftmeg.trainers import forward

    def make(original: Any) -> Any:
        def packed_params(borders: Any, longest: Any) -> Any:
            return original(borders[[0, -1]], borders[-1])

        return packed_params

    _replace(forward, "packed_params", make)


def contiguous_chunks() -> None:
    from swiftmeg.trainers import forward

    def make(original: Any) -> Any:
        def cut_batch(batch: Any, rank: int, size: int) -> Any:
            return {k: t.chunk(size, dim=1)[rank] if t.dim() == 2 else t for k, t in batch.items()}

        return cut_batch

    _replace(forward, "cut_batch", make)


def keys_without_other_ranks_gradients() -> None:
    from swiftmeg.models import context

    _replace(
        context,
        "gather_from_sequence_parallel_region",
        lambda gather: lambda local, _, group: gather(local, False, group),
    )


def positions_of_the_first_rank() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    _replace(
        rope_utils,
        "_get_thd_freqs_on_this_cp_rank",
        lambda get: lambda rank, *args, **kwargs: get(0, *args, **kwargs),
    )


def norms_without_reduction() -> None:
    from swiftmeg.models.native.norm import RMSNorm

    def make(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.weight.sequence_parallel = False

        return __init__

    _replace(RMSNorm, "__init__", make)


def no_gradient_from_cross_entropy() -> None:
    from swiftmeg.models import head

    head.gradient_ = lambda logits, *others: logits.zero_()


def swapped_projections() -> None:
    from swiftmeg.models.layout import Stacked

    _replace(
        Stacked,
        "join_shard",
        lambda join: lambda self, parts, *rest: join(self, parts[::-1], *rest),
    )


def padding_in_the_softmax() -> None:
    from swiftmeg.models import head

    head._words_here = lambda layer, rows: rows


def tied_weights_drift_apart() -> None:
    # the package has a function of the module's name
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_word_embedding_grads = lambda *args, **kwargs: None  # type: ignore[attr-defined]


def same_rows_everywhere() -> None:
    from swiftmeg.data.loader import BatchSplit

    def make(original: Any) -> Any:
        return lambda self, micro, total, rank, size: original(self, micro, total, 0, size)

    _replace(BatchSplit, "__init__", make)


def weights_stand_still() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    _replace(
        DistributedOptimizer,
        "step_with_ready_grads",
        lambda step: lambda self: True,
    )


def no_sum_over_positions() -> None:
    from swiftmeg.tuners.layers import Factor

    _replace(Factor, "sum_over_positions", lambda original: lambda self: None)


def no_sum_over_shards() -> None:
    from swiftmeg.tuners import layers

    _replace(layers, "copy_to_tensor_model_parallel_region", lambda copy: lambda x, group: x)


def no_sum_inside_experts() -> None:
    from swiftmeg.tuners import experts

    _replace(experts, "copy_to_tensor_model_parallel_region", lambda copy: lambda x, group: x)


def start_of_each_shard() -> None:
    from swiftmeg.tuners import adapters

    def make(original: Any) -> Any:
        def cut(values: Any, factor: Any, adapter: Any) -> Any:
            if factor.axis is None:
                return values
            size, axis = adapter.group.size(), factor.axis - factor.weight.dim()
            return values.chunk(size, dim=axis)[0] * size**0.5

        return cut

    _replace(adapters, "cut", make)


def one_adapter_for_all_experts() -> None:
    from swiftmeg.tuners import experts

    def make(original: Any) -> Any:
        def product(self: Any, x: Any, factor: Any, rows: Any) -> Any:
            first = [factor.weight[0]] * len(factor.weight)
            return experts.grouped_product(x, first, list(rows), False)

        return product

    _replace(experts.ExpertAdapter, "product", make)


def merge_without_scale() -> None:
    from swiftmeg.tuners import merge

    def make(original: Any) -> Any:
        def unscaled(models: Any) -> str:
            for each in merge.attached(models):
                each.adapter.scaling["default"] = 1.0
            return str(original(models))

        return unscaled

    _replace(merge, "merge", make)


def reference_with_adapters() -> None:
    from swiftmeg.trainers import live_reference

    live_reference.adapters_off = lambda models: contextlib.nullcontext()


def swapped_sides() -> None:
    from swiftmeg.trainers import dpo_training

    def make(original: Any) -> Any:
        def swapped(*args: Any) -> Any:
            sums = original(*args)
            return sums._replace(
                chosen=sums.rejected,
                rejected=sums.chosen,
                ref_chosen=sums.ref_rejected,
                ref_rejected=sums.ref_chosen,
            )

        return swapped

    _replace(dpo_training, "pair_sums", make)


def mean_of_means_of_pairs() -> None:
    from swiftmeg.trainers.dpo_training import DpoTraining

    def make(original: Any) -> Any:
        def loss(self: Any, *args: Any) -> Any:
            total, count, report = original(self, *args)
            return total / count.clamp(min=1), count.clamp(max=1), report

        return loss

    _replace(DpoTraining, "_loss", make)


def prompts_in_the_sums() -> None:
    from swiftmeg.trainers import dpo_training

    def make(original: Any) -> Any:
        def sums(values: Any, batch: Any) -> Any:
            return original(values, batch | {"labels": batch["labels"].clamp(min=0)})

        return sums

    _replace(dpo_training, "sample_sums", make)


def chunks_by_themselves() -> None:
    from swiftmeg.trainers.sample_sums import _SumOverChunks

    _SumOverChunks.apply = lambda sums: sums  # type: ignore[method-assign]


MUTATIONS = [
    Mutation(mean_of_means, "the loss is a mean of means", Row("dense", "", "padding_free", 2)),
    Mutation(train_on_prompts, "prompts are trained on", Row("dense", "", "padded", 4)),
    Mutation(drop_micro_batches, "every other micro-batch is lost", Row("dense", "", "padded", 4)),
    Mutation(samples_see_each_other, "packed samples attend to each other",
             Row("dense", "", "packed", 1)),
    Mutation(contiguous_chunks, "chunks lie as they come", Row("dense", "cp2", "padded", 4)),
    Mutation(keys_without_other_ranks_gradients, "keys get their own rank's gradient alone",
             Row("dense", "cp2", "packed", 2)),
    Mutation(positions_of_the_first_rank, "positions do not follow the chunks",
             Row("dense", "cp2", "packed", 2)),
    Mutation(norms_without_reduction, "replicated weights see one sequence shard",
             Row("dense", "tp2 sp", "padded", 4)),
    Mutation(no_gradient_from_cross_entropy, "the cross entropy has no gradient",
             Row("dense", "", "padded", 4)),
    Mutation(swapped_projections, "gate and up are swapped", Row("dense", "", "padded", 4)),
    Mutation(padding_in_the_softmax, "padding of the vocabulary takes part",
             Row("dense", "", "padded", 4)),
    Mutation(tied_weights_drift_apart, "tied embeddings get one stage's gradient",
             Row("dense", "pp2", "padding_free", 4)),
    Mutation(same_rows_everywhere, "data-parallel ranks see the same rows",
             Row("dense", "dp2", "packed", 2)),
    Mutation(weights_stand_still, "the optimizer does nothing", Row("dense", "", "padded", 4)),
    Mutation(no_sum_over_positions, "LoRA's whole factor sees one sequence shard",
             Row("dense-lora", "tp2 sp", "padded", 4)),
    Mutation(no_sum_over_shards, "LoRA's whole factor sees one weight shard",
             Row("dense-lora", "tp2", "padded", 4)),
    Mutation(no_sum_inside_experts, "an expert's whole factor sees one weight shard",
             Row("moe-lora", "tp2 sp", "padded", 4)),
    Mutation(start_of_each_shard, "LoRA's shards start alike",
             Row("dense-lora", "tp2", "padded", 4)),
    Mutation(one_adapter_for_all_experts, "experts of a rank share an adapter",
             Row("moe-lora", "ep2 dp2", "padded", 4)),
    Mutation(merge_without_scale, "LoRA is merged without its scale",
             Row("dense-lora", "", "padded", 4)),
    Mutation(reference_with_adapters, "the reference has the adapters",
             Row("dpo-dense-lora", "", "padded", 4)),
    Mutation(swapped_sides, "chosen and rejected are swapped", Row("dpo-dense", "", "padded", 4)),
    Mutation(mean_of_means_of_pairs, "the loss of pairs is a mean of means",
             Row("dpo-dense", "", "packed", 1)),
    Mutation(prompts_in_the_sums, "prompts count in answers' log-probabilities",
             Row("dpo-dense", "", "padded", 4)),
    Mutation(chunks_by_themselves, "a chunk's log-probabilities are not those of the sample",
             Row("dpo-dense", "cp2", "packed", 2)),
]  # fmt: skip
