"""The model that --ref_model names."""

from typing import Any

from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel, read_model


def reference_model(args: Any, model: HFModel) -> HFModel:
    """The model that --ref_model names; UserError unless it computes like the trained one."""
    reference = read_model(
        args.ref_model, use_hf=args.use_hf, trust_remote_code=args.trust_remote_code
    )
    ours, theirs = model.megatron_args, reference.megatron_args
    differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if differing:
        shown = ", ".join(f"{k}={theirs.get(k)} for {ours.get(k)}" for k in differing[:3])
        raise UserError(
            f"--ref_model {args.ref_model} is not a model like --model {model.folder}: {shown}: "
            "name one of the same architecture and sizes"
        )
    return reference
