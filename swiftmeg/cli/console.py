"""What a command shows of the package's log."""

import logging
import os
import warnings


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
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformer_engine)\b")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
