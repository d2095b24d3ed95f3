"""`python -m lckv_megatron.study.speed TASK.json`: how fast models are, measured in turns in one process."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lckv_megatron.study.description import Measurement
from megatron_ext.atomic import write_file
from megatron_ext.console import exit_status, set_up_logging

_COLUMNS = {
    "prefill": "prefill_ms",
    "prefill passes": "prefill_passes",
    "largest batch": "largest_batch",
    "tokens per second": "tokens_per_second",
}


@dataclass(frozen=True)
class SpeedTask:
    """Which models are compared, and how."""

    folders: dict[str, str]
    """Hugging Face folders by the models' keys; the first one's cache is the memory that all get."""

    measure: dict[str, Any]
    """Fields of `Measurement`."""

    output: str


def speeds(folders: Mapping[str, str], measure: Measurement) -> dict[str, dict[str, float]]:
    """Columns of each model, by its key. Raises ConfigError."""
    import torch

    from lckv.generation.config import EngineConfig
    from lckv_megatron.measuring.admission import cache_for
    from lckv_megatron.measuring.comparison import Settings, decoding, prefill
    from lckv_megatron.measuring.subjects import Subject, load_folder, text_tokens
    from lckv_megatron.scoring.text_windows import Coder, read_texts
    from lckv_megatron.study.measuring import context_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = {key: load_folder(Path(path), dtype=None, device=device) for key, path in folders.items()}
    context = min(context_of(model, measure) for model, _ in loaded.values())
    subjects = []
    for key, (model, tokenizer) in loaded.items():
        texts = read_texts(measure.text, measure.json_key)
        prompts = text_tokens(texts, Coder.of_huggingface(tokenizer).encode, measure.sequences, context)
        subjects.append(Subject(key, model, prompts))
    memory = cache_for(subjects[0].model, measure.sequences, context).num_bytes
    settings = Settings(
        (context - 1,),
        context,
        (),
        memory,
        EngineConfig.prefill_tolerance,
        measure.repeats,
        measure.clock,
    )
    columns: dict[str, dict[str, float]] = {key: {} for key in folders}
    for rows in (*prefill(subjects, context - 1, settings), *decoding(subjects, settings)):
        for row in rows:
            if row.measure in _COLUMNS:
                columns[row.model][_COLUMNS[row.measure]] = row.value
    return columns


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    (path,) = sys.argv[1:] if argv is None else argv
    set_up_logging()
    task = SpeedTask(**json.loads(Path(path).read_bytes()))

    def program() -> None:
        answer = speeds(task.folders, Measurement(**task.measure))
        write_file(Path(task.output), json.dumps(answer, indent=1).encode())

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
