"""`python -m lckv_megatron.study.measuring TASK.json`: a trained model is converted, and measured.

The task says where things are, and what is measured; the answer is written to its `output`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lckv_megatron.study.description import Measurement
from megatron_ext.atomic import write_file
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError

_BATCH = 8


@dataclass(frozen=True)
class Task:
    """What is measured of which model."""

    checkpoint: str
    """Folder of checkpoints, or one; a Hugging Face folder is taken as it is."""

    folder: str
    """The Hugging Face folder that is made, unless it is there."""

    export: str | None
    measure: dict[str, Any]
    """Fields of `Measurement`."""

    output: str


def measured(task: Task) -> dict[str, Any]:
    """The numbers of one model. Raises ConfigError."""
    _convert(task)
    return numbers_of(Path(task.folder), Measurement(**task.measure))


def numbers_of(folder: Path, measure: Measurement) -> dict[str, Any]:
    """Loss through the cache, its bytes and the parameters of the model in `folder`, in its own precision."""
    import torch

    from lckv.generation.config import EngineConfig
    from lckv.generation.engine import Engine
    from lckv_megatron.measuring.admission import allocated_bytes, cache_for, committed, fill
    from lckv_megatron.measuring.subjects import load_folder, text_tokens
    from lckv_megatron.measuring.timing import setting
    from lckv_megatron.scoring.perplexity import Cut
    from lckv_megatron.scoring.perplexity import Measurement as Scoring
    from lckv_megatron.scoring.text_windows import Coder, read_texts, whole_texts
    from lckv_megatron.scoring.window_losses import CachedLosses

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_folder(folder, dtype=None, device=device)
    if tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer: texts cannot be measured; set data.tokenizer_model.")
    context = context_of(model, measure)
    chunk = EngineConfig.prefill_chunk if measure.prefill_chunk is None else measure.prefill_chunk
    engine = Engine(model, EngineConfig(max_batch_size=_BATCH, prefill_chunk=chunk), tokenizer=tokenizer)
    losses = CachedLosses(engine, token_by_token=False)
    coder = Coder.of_huggingface(tokenizer)
    texts = whole_texts(read_texts(measure.text, measure.json_key), coder, measure.max_tokens)
    scored = Scoring(Cut(context, measure.stride or context), lambda _: None).run(texts, losses, _BATCH)
    prompts = text_tokens(
        read_texts(measure.text, measure.json_key), coder.encode, measure.sequences, context
    )
    cache = cache_for(model, measure.sequences, context)
    fill(cache, measure.sequences, committed(model, prompts))
    return {
        "kv_bytes_per_token": allocated_bytes(cache, measure.sequences) / (measure.sequences * context),
        "loss": scored.loss,
        "bits_per_byte": scored.bits_per_byte,
        "tokens_per_slot": losses.facts()["compression_ratio"],
        "measured_tokens": scored.tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        **setting(device.type),
    }


def context_of(model: Any, measure: Measurement) -> int:
    """Tokens of a window and of a sequence. Raises ConfigError where the model takes fewer."""
    longest: int = model.config.max_position_embeddings - 1
    if measure.context is not None and measure.context > longest:
        raise ConfigError(
            f"measure.context is {measure.context}; it must be at most {longest}, for the models take "
            f"texts of {longest + 1} tokens."
        )
    return measure.context or longest


def _convert(task: Task) -> None:
    if Path(task.folder).exists():
        return
    from checkpoints_conversion.__main__ import main

    words = ["megatron-to-hf", "--megatron-path", task.checkpoint, "--hf-path", task.folder]
    if task.export is not None:
        words += ["--layer-types", task.export]
    if status := main(words):
        raise SystemExit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    (path,) = sys.argv[1:] if argv is None else argv
    set_up_logging()
    task = Task(**json.loads(Path(path).read_bytes()))

    def program() -> None:
        write_file(Path(task.output), json.dumps(measured(task), indent=1).encode())

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
