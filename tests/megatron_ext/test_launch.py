"""The variables that say how a process was started: what cannot be is said before torch is asked."""

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.launch import world_size

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_torchrun_and_a_single_process() -> None:
    assert world_size(TORCHRUN) == 2
    assert world_size({}) == 1
    assert world_size({"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}) == 1  # set for the whole job
    assert world_size({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}) == 1


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_one_of_them_is_missing(name: str) -> None:
    environment = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(
        ConfigError, match=rf"{name} must be set too.*start the run with torchrun.*unset"
    ) as said:
        world_size(environment)
    assert len(str(said.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"RANK": "0"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "1"}, "RANK and MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_one_of_them_alone(environment: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing} must be set too"):
        world_size(environment)


@pytest.mark.parametrize("name", list(TORCHRUN))
@pytest.mark.parametrize("value", ["", " ", "two", "-1", "1.0", "٢"])
def test_values_that_cannot_be(name: str, value: str) -> None:
    if name == "MASTER_ADDR" and value.strip():
        return  # the name of a machine, for all that is known here
    with pytest.raises(ConfigError, match=f"variable {name} is '{value}'; it must be") as said:
        world_size({**TORCHRUN, name: value})
    assert len(str(said.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=f"variable {name} is '{value}'; it must be"):
        world_size({name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2; the former must be less"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    ],
)
def test_numbers_that_do_not_fit(change: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        world_size({**TORCHRUN, **change})


def test_a_local_rank_alone_is_judged_too() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK is 'gpu'"):
        world_size({"LOCAL_RANK": "gpu"})


@pytest.mark.parametrize(
    ("name", "launcher"),
    [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpiexec")],
)
def test_several_processes_that_know_nothing_of_each_other(name: str, launcher: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{launcher} has started 4 processes .*let {launcher} start one torchrun"
    ):
        world_size({name: "4"})
    assert world_size({**TORCHRUN, name: "4"}) == 2
