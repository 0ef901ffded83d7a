"""Mixture of experts: the layer and its router, over either layer backend.

The router's losses are part of the objective like the method's own: each is a mean over samples by
their weights in it (a sample's trained tokens in fine-tuning), so that it cannot depend on how the
global batch is cut into micro-batches and ranks, or on padding. Upstream's are means over whatever
one rank holds at a time.

What the router has to know of its tokens comes as one number a token (`token_marks`), through the
argument that Megatron calls `padding_mask`: the only one that it hands to experts, also when it
computes a layer again in the backward pass.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    router_gating_linear,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from swiftmeg.models.loss_sums import LOSSES
from swiftmeg.models.router_losses import Samples
from swiftmeg.models.routing import Choice, with_bias_on_softmax


class Router(TopKRouter):
    """Megatron's top-k router with losses that do not depend on the layout.

    aux_loss and seq_aux_loss balance the experts of each sample (Switch Transformer's loss,
    arXiv:2101.03961, with DeepSeek's scope, arXiv:2405.04434): a wider scope than the sample
    would depend on the micro-batch. global_aux_loss (arXiv:2501.11873) balances those of the whole
    global batch, taking the experts' shares from the batch before; in a run's first step it has
    no effect.
    """

    def __init__(
        self,
        *args: Any,
        choice: Choice | None = None,
        has_bias: bool = False,
        fp32: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.exact = ["weight"] if fp32 else []
        if fp32:
            self.weight.data = self.weight.data.float()
        if has_bias:
            bias: Any = torch.nn.Parameter(self.weight.new_zeros(self.num_experts))
            bias.sequence_parallel = self.config.sequence_parallel
            self.bias = bias
        self.choice = choice
        if choice is with_bias_on_softmax:
            self.score_function = "softmax"
        if self.get_aux_loss_coeff("global_aux_loss") > 0:
            even = torch.full_like(self.global_tokens_per_expert, 1.0 / self.num_experts)
            self.register_buffer("shares", even, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the module, but leave its buffers, and what is `exact`, in fp32.

        Megatron casts whole models to half precision, where a bias as published and counts of
        tokens above 256 would be rounded.
        """
        exact = [name for name, _ in self.named_buffers(recurse=False)] + self.exact
        before = {name: getattr(self, name).data for name in exact}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            after = getattr(self, name)
            after.data = (after.data if kept.is_meta else kept.to(after.device)).float()
        return self

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., experts] of tokens [..., h], in the router's dtype.

        The bias is added behind the product: TransformerEngine's, which Megatron takes where it is
        installed, gives other sums for a bfloat16 bias and fp32 logits (seen with 2.20.2). It
        multiplies no matrices of different dtypes.
        """
        dtypes = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = dtypes.get(self.config.moe_router_dtype, input.dtype)
        logits = router_gating_linear(input.to(self.weight.dtype), self.weight, None, dtype)
        return logits if self.bias is None else logits + self.bias.to(dtype)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts by `logits` [s, b, experts]; returns scores and choice [s * b, experts].

        `padding_mask` [s, b] holds `token_marks`; None takes every column for a sample.
        """
        config = self.config
        samples = Samples.of(padding_mask, logits, self.tp_cp_group)
        logits = logits.view(-1, self.num_experts)
        learns = self.training and torch.is_grad_enabled()
        if learns and config.moe_z_loss_coeff:
            # ST-MoE's router z-loss, arXiv:2202.08906.
            squares = logits.float().logsumexp(dim=-1).square()
            logits = self._attach(
                logits, samples, "z_loss", config.moe_z_loss_coeff, samples.mean(squares)
            )
        if self.routing_type == "sinkhorn":
            probs, chosen = self.sinkhorn_load_balancing(logits)
        elif self.choice is not None:
            probs, chosen = self.choice(self, logits)
        else:
            probs, chosen = topk_routing_with_score_function(
                logits,
                self.topk,
                use_pre_softmax=config.moe_router_pre_softmax,
                num_groups=config.moe_router_num_groups,
                group_topk=config.moe_router_group_topk,
                scaling_factor=config.moe_router_topk_scaling_factor,
                score_function=self.score_function,
                expert_bias=self.expert_bias,
                fused=config.moe_router_fusion,
                router_replay=self.router_replay,
            )
        if config.moe_expert_capacity_factor is not None:
            real = samples.real[:, None]
            probs, chosen = apply_router_token_dropping(
                probs * real,
                chosen & real,
                router_topk=self.topk,
                capacity_factor=config.moe_expert_capacity_factor,
                drop_policy=config.moe_token_drop_policy,
                pad_to_capacity=config.moe_pad_expert_input_to_capacity,
            )
        if learns and self.is_aux_loss_enabled():
            probs = self._balance(probs, logits, samples)
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += (chosen & samples.real[:, None]).sum(dim=0)
        return probs, chosen

    def _balance(self, probs: Tensor, logits: Tensor, samples: Samples) -> Tensor:
        """Attach the load-balancing losses to `probs`."""
        chosen, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, fused=self.config.moe_router_fusion
        )
        chosen = chosen.float()
        for kind, name in (
            ("aux_loss", "load_balancing_loss"),
            ("seq_aux_loss", "seq_load_balancing_loss"),
        ):
            if coefficient := self.get_aux_loss_coeff(kind):
                shares = samples.mean_per_sample(chosen) / self.topk
                value = self.num_experts * samples.mean((shares * scores).sum(dim=-1))
                probs = self._attach(probs, samples, name, coefficient, value)
        if coefficient := self.get_aux_loss_coeff("global_aux_loss"):
            self.global_tokens_per_expert += (chosen * samples.real[:, None]).sum(dim=0)
            value = self.num_experts * samples.mean((self.shares * scores).sum(dim=-1))
            probs = self._attach(probs, samples, "global_load_balancing_loss", coefficient, value)
        return probs

    def _attach(
        self, activation: Tensor, samples: Samples, name: str, coefficient: float, value: Tensor
    ) -> Tensor:
        """Add `coefficient * value` to the objective, a weighted sum, and log it."""
        LOSSES.add(name, value, samples.weight.sum())
        loss = coefficient * value
        if not self.calculate_per_token_loss:
            loss = loss / samples.weight_per_sample.sum().clamp(min=1)
        return MoEAuxLossAutoScaler.apply(activation, loss)

    def reset_global_aux_loss_tracker(self) -> None:
        """Take this global batch's shares for the next one; Megatron calls it after each step."""
        if self.global_tokens_per_expert is None or not self.training:
            return
        counts = self.global_tokens_per_expert
        torch.distributed.all_reduce(counts, group=self.tp_dp_cp_group)
        self.shares.copy_(counts / counts.sum().clamp(min=1))
        counts.zero_()


class MoELayer(MegatronMoELayer):
    """Megatron's layer of experts, which hands its router `token_marks`."""

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Send `hidden_states` [s, b, h] through their experts; `padding_mask` [b, s] are marks.

        The marks are those of the whole sequence, also where this rank holds a part of it.
        """
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("experts under tensor parallelism need sequence parallelism")
        marks = None if padding_mask is None else padding_mask.transpose(0, 1)
        if marks is not None and marks.shape[0] != hidden_states.shape[0]:
            marks = marks.chunk(self.attn_tp_group.size())[self.attn_tp_group.rank()]
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._compute, False, hidden_states, marks), None
        return self._compute(hidden_states, marks), None

    def _compute(self, hidden_states: Tensor, marks: Tensor | None) -> Tensor:
        shared = self.shared_experts_compute(hidden_states)
        probs, chosen = self.route(hidden_states, marks)
        tokens, probs = self.preprocess(hidden_states, probs, chosen)
        tokens, probs = self.dispatch(tokens, probs)
        tokens, _ = self.routed_experts_compute(tokens, probs)
        return self.postprocess(self.combine(tokens), shared)
