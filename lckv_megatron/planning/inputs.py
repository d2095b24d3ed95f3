"""What a run reads, as far as this machine has it, and the processes that its recipe is launched on."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.restoring.description import Description
from megatron_ext.restoring.teacher import describe_teacher, obstacle
from megatron_ext.validation.distillation import distillation_problems

if TYPE_CHECKING:
    from megatron_ext.restoring.foreign import OpenForeign

LAUNCH_NAME = "launch.sh"
"""Beside a recipe's settings: the script that starts it, whose lines for Slurm say on how many GPUs."""


def find_vocab_size(run: RunConfig) -> int:
    """From model.vocab_size, the tokenizer or the datasets; raises ConfigError where none of them says."""
    if run.model.vocab_size is not None:
        return run.model.vocab_size
    from megatron_ext.data.checks import find_vocabulary  # loads tokenizers: only other runs wait

    known = find_vocabulary(run.data)
    if known is None:
        raise ConfigError(
            "the vocabulary is unknown; set model.vocab_size, or data.tokenizer_type and "
            "data.tokenizer_model."
        )
    return known.size


def find_teacher(run: RunConfig, world_size: int, vocab_size: int) -> Description | None:
    """The teacher of a run that distils, from its settings alone; None where there is none, or it is not
    here, which `distillation_problems` tells. Raises ConfigError where it cannot teach this run."""
    path = run.train.distillation.teacher
    if path is None or any(distillation_problems(run)):
        return None
    teacher = describe_teacher(run, _reader_of_huggingface)
    if problem := obstacle(run, vocab_size, teacher):
        raise ConfigError(f"train.distillation.teacher {path} {problem}")
    if problems := teacher.layout_problems(world_size):
        raise ConfigError("\n".join(f"train.distillation.teacher {path}: {problem}" for problem in problems))
    return teacher


def _reader_of_huggingface() -> "OpenForeign":
    from checkpoints_conversion.for_training import open_for_training  # loads torch: only such teachers wait

    return open_for_training


def launched_processes(configs: Sequence[str]) -> int | None:
    """Processes that the script beside one of the files of settings starts; None where there is none, or it
    does not say."""
    for config in reversed(configs):
        script = Path(config).parent / LAUNCH_NAME
        if not script.is_file():
            continue
        text = script.read_text(encoding="utf-8", errors="replace")
        matches = [re.search(rf"^#SBATCH --{name}=(\d+)", text, re.M) for name in ("nodes", "gpus-per-node")]
        if all(matches):
            nodes, gpus = (int(match[1]) for match in matches if match)
            return nodes * gpus or None
    return None


def configs_in(words: Sequence[str]) -> list[str]:
    """The files that a command line names with --config."""
    joined = [word if word.startswith("--config=") else "" for word in words]
    apart = [f"--config={value}" for word, value in pairwise(words) if word == "--config"]
    return [word.partition("=")[2] for word in (*joined, *apart) if word]


def missing_paths(run: RunConfig) -> Iterator[str]:
    """A sentence for each file or folder that the run reads and that is not here."""
    for prefix in _prefixes(run):
        if absent := [f"{prefix}.{end}" for end in ("bin", "idx") if not Path(f"{prefix}.{end}").is_file()]:
            yield (
                f"the dataset {prefix} is not here ({' and '.join(absent)}); make it with lckv-megatron "
                "preprocess, copy it here, or give another prefix."
            )
    tokenizer = run.data.tokenizer_model
    if run.data.tokenizer_type != "none" and tokenizer is not None and not Path(tokenizer).exists():
        yield (
            f"data.tokenizer_model is {tokenizer}, which is not here; give the folder or file of the "
            "tokenizer."
        )
    load, save = run.checkpoint.load, run.checkpoint.save
    goes_on = save is not None and any(Path(save).glob("iter_*"))
    if load is not None and not Path(load).exists() and not goes_on:
        yield f"checkpoint.load is {load}, which is not here; give the checkpoints to start from."


def epoch_lines(run: RunConfig, tokens: int) -> Iterator[str]:
    """How often the run reads each of its training datasets, whose descriptions say how long they are."""
    from megatron_ext.data.blends import split_sources

    try:
        source = None if run.data.mock else split_sources(run.data)[0]
        if source is None:
            return
        prefixes, share = source.blend.prefixes, source.end - source.begin
        lengths = [_tokens(prefix) for prefix in prefixes]
    except ConfigError as error:  # a problem of the settings, which is told as such
        yield f"data                  epochs are not known: {str(error).splitlines()[0]}"
        return
    unknown = [prefix for prefix, length in zip(prefixes, lengths, strict=True) if length is None]
    if unknown:
        yield f"data                  epochs are not known: no description of {', '.join(unknown)} is here"
        return
    known = [share * (length or 0) for length in lengths]
    weights = source.blend.weights or known
    for prefix, weight, length in zip(prefixes, weights, known, strict=True):
        of_it = tokens * weight / (sum(weights) or 1)
        epochs = of_it / length if length else float("inf")
        yield f"data                  {epochs:,.2f} epochs of {prefix}, {of_it:,.0f} tokens"


def _prefixes(run: RunConfig) -> list[str]:
    from megatron_ext.data.blends import split_sources

    if run.data.mock:
        return []
    try:
        sources = [source for source in split_sources(run.data) if source is not None]
    except ConfigError:
        return []
    return list(dict.fromkeys(prefix for source in sources for prefix in source.blend.prefixes))


def dataset_contents(run: RunConfig) -> dict[str, str]:
    """What tells each dataset that the run reads from another one, by its prefix: the hash of its tokens, or
    where its description has none the size and the time of the file; empty where it is not here."""
    return {prefix: _content(prefix) for prefix in _prefixes(run)}


def _content(prefix: str) -> str:
    from megatron_ext.data.description import read_manifest

    manifest, path = read_manifest(prefix), Path(f"{prefix}.bin")
    if manifest is not None and manifest.content:
        return manifest.content
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}" if path.exists() else ""


def _tokens(prefix: str) -> int | None:
    from megatron_ext.data.description import read_manifest

    manifest = read_manifest(prefix)
    return None if manifest is None else manifest.tokens
