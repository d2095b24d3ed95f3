"""NCCL's flight recorder: the last collectives of each rank, written to a file when one of them times out.

torch's own analyzer says what the files mean (docs/debugging_a_hang.md):
torchfrtrace --prefix rank_ FOLDER
"""

from collections.abc import MutableMapping
from pathlib import Path

from megatron_ext.config import RunConfig

FOLDER_NAME = "flight_recorder"
_PREFIX = "rank_"

_NAMES = {
    "entries": ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
    "dump": ("TORCH_NCCL_DUMP_ON_TIMEOUT",),
    "file": ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"),
}
"""Variables that mean the same. All versions of torch know the first; newer ones prefer the last."""


def switch_on(run: RunConfig, environment: MutableMapping[str, str]) -> None:
    """Sets what `run` asks for, but for what is set already. To be called before process groups are made."""
    if run.parallel.flight_recorder_entries == 0:
        return
    values = {"entries": str(run.parallel.flight_recorder_entries), "dump": "1"}
    if run.checkpoint.save is not None:
        values["file"] = str(Path(run.checkpoint.save).absolute() / FOLDER_NAME / _PREFIX)
    for meaning, value in values.items():
        if not any(name in environment for name in _NAMES[meaning]):
            environment[_NAMES[meaning][0]] = value


def make_folder(save: Path) -> None:
    """Makes the folder of the files, which torch does not. Raises OSError."""
    (save / FOLDER_NAME).mkdir(exist_ok=True)
