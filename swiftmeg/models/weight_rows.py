"""Weight rows that families share, under the HF names that most of them publish."""

import dataclasses

from swiftmeg.models.family import EMBEDDING, Row, row
from swiftmeg.models.layout import GATE_UP, QKV, VOCABULARY

LAYER = "decoder.layers.{i}."
ATTENTION = LAYER + "self_attention."
MLP = LAYER + "mlp."
HF_LAYER = "model.layers.{i}."
HF_ATTENTION = HF_LAYER + "self_attn."
HF_MLP = HF_LAYER + "mlp."


def gate_up_rows(mcore: str, hf: str, bias: bool = False) -> tuple[Row, ...]:
    """A gated MLP: `mcore` and `hf` are what its tensors' names begin with."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return tuple(
        made
        for kind in kinds
        for made in (
            row(
                f"{mcore}linear_fc1.{kind}",
                f"{hf}gate_proj.{kind}",
                f"{hf}up_proj.{kind}",
                layout=GATE_UP,
            ),
            row(f"{mcore}linear_fc2.{kind}", f"{hf}down_proj.{kind}"),
        )
    )


DENSE_ROWS = (
    row(EMBEDDING, "model.embed_tokens.weight", layout=VOCABULARY),
    row(LAYER + "input_layernorm.weight", HF_LAYER + "input_layernorm.weight"),
    row(
        ATTENTION + "linear_qkv.weight",
        *(HF_ATTENTION + f"{x}_proj.weight" for x in "qkv"),
        layout=QKV,
    ),
    row(
        ATTENTION + "linear_qkv.bias",
        *(HF_ATTENTION + f"{x}_proj.bias" for x in "qkv"),
        layout=QKV,
    ),
    row(ATTENTION + "q_layernorm.weight", HF_ATTENTION + "q_norm.weight"),
    row(ATTENTION + "k_layernorm.weight", HF_ATTENTION + "k_norm.weight"),
    row(ATTENTION + "linear_proj.weight", HF_ATTENTION + "o_proj.weight"),
    row(ATTENTION + "linear_proj.bias", HF_ATTENTION + "o_proj.bias"),
    row(LAYER + "pre_mlp_layernorm.weight", HF_LAYER + "post_attention_layernorm.weight"),
    *gate_up_rows(MLP, HF_MLP, bias=True),
    row("decoder.final_layernorm.weight", "model.norm.weight"),
    row("output_layer.weight", "lm_head.weight", layout=VOCABULARY),
)
"""The Llama-like decoders that transformers writes."""


NORM_AFTER_ROWS = (
    row(LAYER + "post_self_attn_layernorm.weight", HF_LAYER + "post_self_attn_layernorm.weight"),
    row(LAYER + "post_mlp_layernorm.weight", HF_LAYER + "post_mlp_layernorm.weight"),
)
"""Norms of what attention and MLP add to the residual stream, under GLM's names."""


def expert_rows(
    gate: str, up: str, down: str, hf: str = HF_MLP + "experts.{e}."
) -> tuple[Row, ...]:
    """Routed experts, one HF tensor an expert; the three names as published, without `.weight`.

    transformers 5 keeps the experts of a layer in one tensor; it writes the published form, but
    others write what is in memory.
    """
    experts, stack = MLP + "experts.", HF_MLP + "experts."
    fc1 = row(
        experts + "linear_fc1.weight{e}", f"{hf}{gate}.weight", f"{hf}{up}.weight", layout=GATE_UP
    )
    fc2 = row(experts + "linear_fc2.weight{e}", f"{hf}{down}.weight")
    return (
        dataclasses.replace(fc1, stack=stack + "gate_up_proj"),
        dataclasses.replace(fc2, stack=stack + "down_proj"),
    )


def shared_expert_rows(name: str) -> tuple[Row, ...]:
    """What every token passes: `name` is `shared_expert` or `shared_experts`."""
    return gate_up_rows(MLP + "shared_experts.", HF_MLP + f"{name}.")


MOE_ROWS = (
    *DENSE_ROWS,
    row(MLP + "router.weight", HF_MLP + "gate.weight"),
    *expert_rows("gate_proj", "up_proj", "down_proj"),
)
"""Decoders with routed experts: Qwen's names, which most families took over."""

EXPERT_BIAS_ROW = row(
    MLP + "router.expert_bias", HF_MLP + "gate.e_score_correction_bias", fp32=True
)
"""What steers the choice of experts without an auxiliary loss."""

_MLA = (
    ("linear_q_proj", "q_proj"),
    ("linear_q_down_proj", "q_a_proj"),
    ("q_layernorm", "q_a_layernorm"),
    ("linear_q_up_proj", "q_b_proj"),
    ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
    ("kv_layernorm", "kv_a_layernorm"),
    ("linear_kv_up_proj", "kv_b_proj"),
    ("linear_proj", "o_proj"),
)

MLA_ROWS = tuple(row(f"{ATTENTION}{m}.weight", f"{HF_ATTENTION}{h}.weight") for m, h in _MLA)
"""Multi-head latent attention (arXiv:2405.04434)."""


MTP_LAYER = "mtp.layers.{i}."
"""A multi-token prediction module (arXiv:2412.19437), counted on its own."""


def prediction_rows(rows: tuple[Row, ...], hf_layer: str) -> tuple[Row, ...]:
    """The decoder layer's rows for the layer inside a multi-token prediction module.

    `hf_layer` is what its HF names begin with, in place of `model.layers.{i}.`.
    """
    return tuple(
        dataclasses.replace(
            each,
            mcore=each.mcore.replace(LAYER, MTP_LAYER + "mtp_model_layer."),
            hf=tuple(name.replace(HF_LAYER, hf_layer) for name in each.hf),
        )
        for each in rows
        if each.mcore.startswith(LAYER)
    )


def deepseek_prediction_rows(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Prediction modules that are published as layers after the decoder's last.

    They repeat the embedding and the output layer, which all modules share.
    """
    hf = "model.layers.{n}."
    names = ("enorm", "hnorm", "eh_proj")
    shared = {
        "embedding.word_embeddings.weight": hf + "embed_tokens.weight",
        "output_layer.weight": hf + "shared_head.head.weight",
    }
    return (
        *(row(f"{MTP_LAYER}{name}.weight", f"{hf}{name}.weight") for name in names),
        row(MTP_LAYER + "final_layernorm.weight", hf + "shared_head.norm.weight"),
        *prediction_rows(rows, hf),
        *(
            dataclasses.replace(each, copies=(shared[each.mcore],))
            for each in rows
            if each.mcore in shared
        ),
    )


DEEPSEEK_PREDICTIONS = r"model\.layers\.{n}\..*"
"""Names of everything in a prediction module; `{n}`: the numbers from the decoder's on."""
