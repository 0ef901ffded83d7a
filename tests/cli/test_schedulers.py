"""Jobs that a scheduler has described or started."""

import pytest

from swiftmeg import distributed
from swiftmeg.cli.launch import job_size, requested, topology
from swiftmeg.cli.schedulers import adopt, first_node
from swiftmeg.errors import UserError
from tests.ranks import free_port

PET = {
    "PET_NPROC_PER_NODE": "4",
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "first",
    "PET_MASTER_PORT": "23456",
}
STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


def test_a_node_of_a_pytorchjob_starts_its_ranks() -> None:
    environ = dict(PET)
    adopt(environ)
    job = topology(environ)
    assert requested(environ)
    assert (job.nproc_per_node, job.nnodes, job.node_rank) == (4, 2, 1)
    assert (job.master_addr, job.master_port) == ("first", 23456)
    assert job_size(environ) == 8


def test_own_variables_win_and_ranks_stay_as_they_are() -> None:
    environ = PET | {"NPROC_PER_NODE": "2"}
    adopt(environ)
    assert environ["NPROC_PER_NODE"] == "2"
    rank = PET | {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "8"}
    before = dict(rank)
    adopt(rank)
    assert rank == before


def test_an_endpoint_and_a_fixed_range_of_nodes() -> None:
    environ = {"PET_NNODES": "2:2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "first:29400"}
    adopt(environ)
    job = topology(environ)
    assert (job.nnodes, job.master_addr, job.master_port) == (2, "first", 29400)
    with pytest.raises(UserError, match="PET_NNODES='1:4' lets the number of nodes vary"):
        adopt({"PET_NNODES": "1:4"})


def test_a_process_of_srun_is_a_rank() -> None:
    environ = dict(STEP)
    adopt(environ)
    assert not requested(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("5", "8", "1")
    assert environ["MASTER_ADDR"] == "gpu003"
    other = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    adopt(other)
    assert other["MASTER_PORT"] == environ["MASTER_PORT"]


@pytest.mark.parametrize("lacks", ["SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"])
def test_a_batch_script_is_no_rank(lacks: str) -> None:
    """It has many of srun's variables."""
    environ = {name: value for name, value in STEP.items() if name != lacks}
    adopt(environ)
    assert "RANK" not in environ
    launched = STEP | {"NPROC_PER_NODE": "8"}  # one task a node, which starts the ranks
    adopt(launched)
    assert requested(launched)
    assert "RANK" not in launched


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a1,b2", "a1"),
        ("gpu[003-007,9],x", "gpu003"),
        ("n[12]", "n12"),
        ("r1-n[5,7]-ib", "r1-n5-ib"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_bare_rank_is_taken_or_named() -> None:
    meeting = {"MASTER_ADDR": "first", "MASTER_PORT": "1"}
    environ = {"RANK": "1", "WORLD_SIZE": "2"} | meeting
    adopt(environ)
    assert environ["LOCAL_RANK"] == "0"
    assert not requested(environ)
    alone = {"WORLD_SIZE": "2", "RANK": "0"}
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 RANK=0 .*MASTER_ADDR, MASTER_PORT is not"):
        adopt(alone)
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 .*RANK is not set"):
        adopt({"WORLD_SIZE": "2"} | meeting)
    with pytest.raises(UserError, match="RANK=2 must be below WORLD_SIZE=2"):
        adopt({"WORLD_SIZE": "2", "RANK": "2"} | meeting)
    with pytest.raises(UserError, match="RANK='x' must be a whole number"):
        adopt({"WORLD_SIZE": "2", "RANK": "x"} | meeting)


def test_a_wait_names_whom_it_waits_for_and_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "NOTICE", 1)
    monkeypatch.setattr(distributed, "PATIENCE", 3)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    for rank, other in ((0, 1), (1, 0)):
        for name, value in (meeting | {"RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"rank {rank} has not met rank {other} at MASTER_ADDR"):
            distributed._meet()
        assert f"rank {rank} waits for rank {other} at MASTER_ADDR=127" in capfd.readouterr().err
