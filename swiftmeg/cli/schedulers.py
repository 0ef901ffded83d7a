"""What a scheduler's environment says of the job, in the variables that the launcher knows."""

import re
from collections.abc import MutableMapping

from swiftmeg.errors import UserError

_NODE = {
    "PET_NPROC_PER_NODE": "NPROC_PER_NODE",
    "PET_NNODES": "NNODES",
    "PET_NODE_RANK": "NODE_RANK",
    "PET_MASTER_ADDR": "MASTER_ADDR",
    "PET_MASTER_PORT": "MASTER_PORT",
}
"""torchrun's own variables, as a PyTorchJob sets them for each node."""

_PORTS = range(20000, 30000)
"""Among which the port of a Slurm step is chosen by its number, the same on every node."""


def adopt(environ: MutableMapping[str, str]) -> None:
    """Translate the variables of a PyTorchJob, of srun or of a bare rank; set ones stay.

    UserError for variables that describe half a job.
    """
    if "LOCAL_RANK" in environ:
        return
    adopt_nodes(environ)
    if "NPROC_PER_NODE" in environ or "NNODES" in environ:
        return
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in environ and "SLURM_STEP_ID" in environ and tasks != "1":
        _adopt_step(environ, tasks)
    elif "RANK" in environ or "WORLD_SIZE" in environ:
        _adopt_rank(environ)


def adopt_nodes(environ: MutableMapping[str, str]) -> None:
    """Take torchrun's variables of a node, which stand for its flags."""
    if not environ.keys() & {"PET_NPROC_PER_NODE", "PET_NNODES"}:
        return
    for theirs, ours in _NODE.items():
        if theirs in environ:
            environ.setdefault(ours, environ[theirs])
    if (place := environ.get("PET_RDZV_ENDPOINT")) and "MASTER_ADDR" not in environ:
        host, _, port = place.rpartition(":")
        environ["MASTER_ADDR"] = host or place
        if host:
            environ.setdefault("MASTER_PORT", port)
    if match := re.fullmatch(r"(\d+):\1", environ.get("NNODES", "")):
        environ["NNODES"] = match[1]
    if ":" in environ.get("NNODES", ""):
        raise UserError(
            f"PET_NNODES={environ['NNODES']!r} lets the number of nodes vary: training needs one"
        )
    if environ.get("NPROC_PER_NODE") in ("auto", "gpu"):
        import torch

        environ["NPROC_PER_NODE"] = str(max(1, torch.cuda.device_count()))


def _adopt_step(environ: MutableMapping[str, str], tasks: str) -> None:
    """Be the rank that srun has started, one of `tasks`."""
    environ["WORLD_SIZE"] = tasks
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
    environ.setdefault("MASTER_ADDR", first_node(nodes))
    number = int(environ.get("SLURM_JOB_ID", "0")) * 31 + int(environ["SLURM_STEP_ID"])
    environ.setdefault("MASTER_PORT", str(_PORTS[number % len(_PORTS)]))


def first_node(nodes: str) -> str:
    """The first name of Slurm's list of nodes, such as gpu[003-007,9],login1."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def _adopt_rank(environ: MutableMapping[str, str]) -> None:
    """Be the rank that RANK and WORLD_SIZE name, the only one of its node."""
    names = ["WORLD_SIZE", "RANK"]
    if environ.get("WORLD_SIZE", "1") != "1":
        names += ["MASTER_ADDR", "MASTER_PORT"]
    found = " ".join(f"{name}={environ[name]}" for name in names if name in environ)
    if missing := [name for name in names if name not in environ]:
        raise UserError(
            f"{found} describes one process of a job, but {', '.join(missing)} is not set: set it "
            "too, or give NPROC_PER_NODE and NNODES to have processes started"
        )
    for name in ("WORLD_SIZE", "RANK"):
        if not environ[name].isdecimal():
            raise UserError(f"{name}={environ[name]!r} must be a whole number")
    if int(environ["RANK"]) >= int(environ["WORLD_SIZE"]):
        raise UserError(f"RANK={environ['RANK']} must be below WORLD_SIZE={environ['WORLD_SIZE']}")
    environ["LOCAL_RANK"] = "0"
