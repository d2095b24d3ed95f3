"""The variables of NCCL's flight recorder, and what torch's analyzer makes of a record."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

from megatron_ext.parallel.flight_recorder import switch_on
from tests.megatron_ext.training.runs import tiny_run


def test_it_is_on_and_writes_below_the_runs_folder(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    switch_on(tiny_run(checkpoint={"save": str(tmp_path)}), environment)
    assert environment == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(tmp_path / "flight_recorder" / "rank_"),
    }


def test_a_run_that_saves_nothing_leaves_the_place_to_torch() -> None:
    environment: dict[str, str] = {}
    switch_on(tiny_run(parallel={"flight_recorder_entries": 7}), environment)
    assert environment == {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    given = {
        "TORCH_FR_BUFFER_SIZE": "5",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_FR_DUMP_TEMP_FILE": "/elsewhere/rank_",
    }
    environment = dict(given)
    switch_on(tiny_run(checkpoint={"save": str(tmp_path)}), environment)
    assert environment == given


def test_it_can_be_left_to_the_environment(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    run = tiny_run(checkpoint={"save": str(tmp_path)}, parallel={"flight_recorder_entries": 0})
    switch_on(run, environment)
    assert environment == {}


def _record(rank: int, done: int) -> bytes:
    """What NCCL writes: rank `rank` of two has begun `done` all-reduces of the same group."""
    entries = [
        {
            "record_id": number, "pg_id": 0, "process_group": ("0", "default_pg"), "p2p_seq_id": 0,
            "collective_seq_id": number + 1, "op_id": number + 1, "profiling_name": "nccl:all_reduce",
            "time_created_ns": number, "input_sizes": [[3]], "input_dtypes": ["Float"],
            "output_sizes": [[3]], "output_dtypes": ["Float"],
            "state": "completed" if number + 1 < done else "started", "time_discovered_started_ns": None,
            "time_discovered_completed_ns": None, "retired": False, "timeout_ms": 600000, "is_p2p": False,
            "frames": [],
        }
        for number in range(done)
    ]  # fmt: skip
    return pickle.dumps(
        {
            "version": "2.10",
            "rank": rank,
            "entries": entries,
            "pg_config": {"0": {"name": "0", "desc": "default_pg", "ranks": json.dumps([0, 1])}},
            "pg_status": {},
            "host_name": "host",
        }
    )


def test_torchs_analyzer_names_the_rank_that_did_not_come(tmp_path: Path) -> None:
    """The command of docs/debugging_a_hang.md, on files of the names that are asked for here."""
    for rank, done in ((0, 3), (1, 2)):
        (tmp_path / f"rank_{rank}").write_bytes(_record(rank, done))
    program = "from torch.distributed.flight_recorder.fr_trace import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", program, "--prefix", "rank_", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = result.stdout + result.stderr
    assert result.returncode == 0, told
    assert "all_reduce" in told
    assert "{1}" in told, told
