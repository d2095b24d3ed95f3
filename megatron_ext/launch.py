"""How this process was started: alone, or as one of several, by the variables that torchrun sets.

torch.distributed reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; this package reads LOCAL_RANK too.
"""

import re
from collections.abc import Iterator, Mapping

from megatron_ext.errors import ConfigError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 1}
"""The least that each may be."""
_SIZES_OF_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
_WAY_OUT = "start the run with torchrun, which sets them, or unset them for a run of one process"


def world_size(environment: Mapping[str, str]) -> int:
    """Processes of the run. Raises ConfigError with everything in `environment` that cannot be."""
    problems = [*_problems(environment)]
    if problems:
        raise ConfigError("\n".join(problems))
    return int(environment.get("WORLD_SIZE", "1"))


def _problems(environment: Mapping[str, str]) -> Iterator[str]:
    given = [name for name in (*_NEEDED, "LOCAL_RANK") if name in environment]
    wrong = [name for name in given if _is_wrong(name, environment[name])]
    for name in wrong:
        least = (
            f"a whole number of at least {_NUMBERS[name]}" if name in _NUMBERS else "the name of a machine"
        )
        yield f"the environment variable {name} is {environment[name]!r}; it must be {least}: {_WAY_OUT}."
    if wrong:
        return
    if not {"RANK", "WORLD_SIZE"} & {*given}:
        yield from _forgotten_launcher(environment)
        return
    missing = [name for name in _NEEDED if name not in given]
    if missing:
        set_names = ", ".join(f"{name}={environment[name]}" for name in given)
        yield (
            f"of the environment variables {', '.join(_NEEDED)}, {' and '.join(missing)} must be set too "
            f"(set are {set_names}): {_WAY_OUT}."
        )
    elif int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        yield (
            f"the environment variable RANK is {environment['RANK']} and WORLD_SIZE "
            f"{environment['WORLD_SIZE']}; the former must be less than the latter: {_WAY_OUT}."
        )


def _is_wrong(name: str, value: str) -> bool:
    if name not in _NUMBERS:
        return not value.strip()
    if not re.fullmatch(r"[0-9]{1,9}", value):
        return True
    return int(value) < _NUMBERS[name] or (name == "MASTER_PORT" and int(value) > 65535)


def _forgotten_launcher(environment: Mapping[str, str]) -> Iterator[str]:
    """Several processes that each would be a run of its own, into the same folders."""
    for name, launcher in _SIZES_OF_LAUNCHERS.items():
        size = environment.get(name, "")
        if size.isascii() and size.isdigit() and int(size) > 1:
            yield (
                f"{launcher} has started {size} processes ({name}), but RANK is not set, so each would be a "
                f"run of its own; let {launcher} start one torchrun on each machine, as "
                f"examples/launch_on_slurm.sh does, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
            )
