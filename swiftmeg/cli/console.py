"""What a command shows of the package's log."""

import logging
import os
import warnings

_DEPRECATIONS = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.validation",
    "megatron.core.rerun_state_machine",
)
"""Loggers whose warnings are about Megatron's own plans, on every run."""


def start_logging() -> None:
    """Show the package's own log lines, from rank 0, and keep the libraries' chatter out."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("swiftmeg")
    package.handlers[:] = [handler]
    package.setLevel(level)
    package.propagate = False
    # Deprecations inside torch and Megatron are nothing that a user can act on.
    for module in (r"(megatron|torch|transformer_engine)\b", r"swiftmeg\.platform"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings(
        "ignore", message=r"The \.grad attribute of a Tensor that is not a leaf"
    )
    for name in ("megatron", "matplotlib", "tensorboard"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _DEPRECATIONS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
