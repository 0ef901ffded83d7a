"""Flags that say which weights are trained."""

from dataclasses import dataclass, field


@dataclass
class FreezingArguments:
    """Freezing of parameters

    Parameters go by Megatron's names with the layer's number in the whole model, whatever the
    layout: `decoder.layers.0.self_attention.linear_qkv.weight`. A norm that TransformerEngine keeps
    inside a linear layer is known by both names, `decoder.layers.0.input_layernorm.weight` and
    `decoder.layers.0.self_attention.linear_qkv.layer_norm_weight`.
    """

    freeze_parameters: list[str] = field(default_factory=list)
    """Prefixes of the parameters that stay as they are."""
    freeze_parameters_regex: str | None = None
    """Regular expression, found anywhere in the name, of parameters that stay as they are."""
    freeze_parameters_ratio: float = 0.0
    """Share of all weights, counted from the embedding on, whose parameters stay as they are; needs
    the whole model on every rank, so no pipeline or expert parallelism."""
    trainable_parameters: list[str] = field(default_factory=list)
    """Prefixes of parameters that are trained although frozen otherwise."""
    trainable_parameters_regex: str | None = None
    """Regular expression of parameters that are trained although frozen otherwise."""

    @property
    def freezes(self) -> bool:
        """True if some flag freezes parameters."""
        return bool(
            self.freeze_parameters or self.freeze_parameters_regex or self.freeze_parameters_ratio
        )
