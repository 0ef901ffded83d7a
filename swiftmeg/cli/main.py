"""The programs `megatron` and `swift`: find the command, start its processes, run it."""

import difflib
import importlib
import os
import sys
from typing import NamedTuple

import swiftmeg
from swiftmeg.args.config import asks_for, export_environment
from swiftmeg.cli import launch
from swiftmeg.cli.failure import guarded
from swiftmeg.cli.schedulers import adopt, adopt_nodes
from swiftmeg.errors import UserError


class Command(NamedTuple):
    """Where a command's `main(argv)` is, and whether it may run as several processes."""

    target: str
    summary: str
    distributed: bool = False


# Imported only when called: torch and megatron take seconds that `--help` need not spend.
COMMANDS: dict[str, dict[str, Command]] = {
    "megatron": {
        "sft": Command("swiftmeg.cli.sft:main", "supervised fine-tuning", distributed=True),
        "pt": Command("swiftmeg.cli.pt:main", "(continued) pre-training", distributed=True),
        "rlhf": Command("swiftmeg.cli.rlhf:main", "training on preferences", distributed=True),
        "data": Command(
            "swiftmeg.cli.data:main", "prepare the data of a training command, and look at them"
        ),
        "doctor": Command(
            "swiftmeg.cli.doctor:main", "say what works on this machine, and how to get the rest"
        ),
    },
    "swift": {
        "export": Command(
            "swiftmeg.cli.export:main",
            "convert between Hugging Face and Megatron checkpoints",
            distributed=True,
        ),
        "infer": Command("swiftmeg.cli.infer:main", "chat with a model, or run it over a dataset"),
    },
}


def megatron() -> None:
    """Entry point of the `megatron` program."""
    sys.exit(run("megatron", sys.argv[1:]))


def swift() -> None:
    """Entry point of the `swift` program."""
    sys.exit(run("swift", sys.argv[1:]))


def run(program: str, argv: list[str]) -> int:
    """Run `program` with the words `argv`; return its exit code (see `guarded`)."""
    return guarded(lambda: _dispatch(program, argv))


def _dispatch(program: str, argv: list[str]) -> int | None:
    if argv[:1] in (["-h"], ["--help"]):
        print(_usage(program))
        return 0
    if argv[:1] == ["--version"]:
        print(f"swiftmeg {swiftmeg.__version__}")
        return 0
    command = _find(program, argv)
    wants_help = not {"-h", "--help"}.isdisjoint(argv)
    export_environment(argv[1:], os.environ)
    if command.distributed and not wants_help:
        # Megatron's overlap of communication with computation relies on one hardware queue.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if asks_for(argv[1:], "dry_run"):
            # One process stands for all, wherever it was started.
            adopt_nodes(os.environ)
            os.environ["WORLD_SIZE"] = str(launch.job_size(os.environ))
        else:
            adopt(os.environ)
            if launch.requested(os.environ):
                return launch.launch(["-m", "swiftmeg.cli.main", program, *argv])
    module, _, function = command.target.partition(":")
    code: int | None = getattr(importlib.import_module(module), function)(argv[1:])
    return code


def _find(program: str, argv: list[str]) -> Command:
    commands = COMMANDS[program]
    if not argv:
        raise UserError(f"{program} needs a command: {', '.join(commands)}; see {program} --help")
    name = argv[0]
    if name in commands:
        return commands[name]
    for other, theirs in COMMANDS.items():
        if name in theirs:
            raise UserError(f"{program} has no command {name!r}: did you mean {other} {name}?")
    near = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(commands)}"
    raise UserError(f"{program} has no command {name!r}: {hint}")


def _usage(program: str) -> str:
    width = max(map(len, COMMANDS[program]))
    rows = [f"  {name:{width}}  {c.summary}" for name, c in COMMANDS[program].items()]
    usage = f"usage: {program} COMMAND [--flag value ...]"
    return "\n".join([usage, "", *rows, "", "COMMAND --help lists the flags of one."])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
