"""The program: one subcommand for each direction, one to prove, one to look."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import yaml

from checkpoints_conversion.compression_options import given_changes
from checkpoints_conversion.hub import local_folder
from checkpoints_conversion.options import build_parser
from checkpoints_conversion.places import check_export, check_huggingface, check_legacy
from checkpoints_conversion.staging import check_free
from megatron_ext.checkpointing.folders import find_candidates
from megatron_ext.config import ParallelConfig
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError
from megatron_ext.files import check_input

if TYPE_CHECKING:
    import torch

    from checkpoints_conversion.description import ModelDescription

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m checkpoints_conversion") -> int:
    """The program, called `prog` in its help; returns its exit status: 0, 1 where models differ that should
    not, 2 where something cannot be done, 128 and its number where a signal stopped it."""
    options = build_parser(prog).parse_args(argv)
    set_up_logging()
    return exit_status(lambda: _RUN[options.command](options), on_stop="; nothing was written")


# torch and Megatron are loaded below only: --help, bad options and wrong paths are answered at once.


def _run_hf_to_megatron(options: argparse.Namespace) -> None:
    check_free(options.megatron_path)
    check_huggingface(options.hf_path)
    from checkpoints_conversion.calibration import DEFAULT_TOKENS, Calibration
    from checkpoints_conversion.convert import hf_to_megatron

    calibration = None
    if options.calibration_text is not None:
        calibration = Calibration(options.calibration_text, options.calibration_tokens or DEFAULT_TOKENS)
    elif options.calibration_tokens is not None:
        raise ConfigError("--calibration-tokens is given without --calibration-text; give both, or neither.")
    hf_to_megatron(
        options.hf_path,
        options.megatron_path,
        changes=given_changes(options),
        how=options.init,
        calibration=calibration,
        dtype=_dtype(options.dtype),
        allow_pickle=options.allow_pickle,
        proof=options.verify,
    )


def _run_megatron_to_hf(options: argparse.Namespace) -> None:
    check_export(options.megatron_path, options.hf_path, options.tokenizer)
    from checkpoints_conversion.convert import megatron_to_hf

    megatron_to_hf(
        options.megatron_path,
        options.hf_path,
        layer_types=options.layer_types,
        family=options.family,
        dtype=_dtype(options.dtype),
        max_shard_bytes=options.max_shard_size,
        tokenizer=options.tokenizer,
        metrics_file=options.metrics_file,
        proof=options.verify,
    )


def _run_legacy_to_megatron(options: argparse.Namespace) -> None:
    check_legacy(options.legacy_path, options.megatron_path, options.tokenizer)
    from checkpoints_conversion.convert import legacy_to_megatron

    legacy_to_megatron(
        options.legacy_path,
        options.megatron_path,
        vocab_size=options.vocab_size,
        given=dict(map(_argument, options.argument)),
        dtype=_dtype(options.dtype),
        tokenizer=options.tokenizer,
        proof=options.verify,
    )


def _run_verify(options: argparse.Namespace) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor, pipeline_model_parallel_size=options.pipeline
    )
    needed = options.tensor * options.pipeline
    if options.nproc_per_node not in (None, needed):
        raise ConfigError(
            f"--nproc-per-node is {options.nproc_per_node}; it must be {needed}, "
            f"--parallel.tensor_model_parallel_size {options.tensor} times "
            f"--parallel.pipeline_model_parallel_size {options.pipeline}. Leave it out, or change the sizes."
        )
    if min(options.rows, options.seq_length) < 1:
        raise ConfigError(
            f"--rows is {options.rows} and --seq-length {options.seq_length}; they must be at least 1."
        )
    check_input("--tokens", options.tokens)
    find_candidates(options.megatron_path)
    folder = local_folder(options.hf_path)
    from checkpoints_conversion.opening import open_megatron, open_model
    from checkpoints_conversion.verify import ProofError, Tolerance, compare, random_tokens
    from megatron_ext.evaluation.logits_file import read_tokens

    original = open_model(
        folder,
        allow_pickle=options.allow_pickle,
        vocab_size=options.vocab_size,
        given=dict(map(_argument, options.argument)),
    )
    megatron = open_megatron(options.megatron_path, layer_types=options.layer_types)
    vocab_size = megatron.description.vocab_size
    if options.tokens is not None:
        tokens = read_tokens(options.tokens, vocab_size)
    else:
        tokens = random_tokens(vocab_size, rows=options.rows, length=options.seq_length, seed=options.seed)
    heads = megatron.description.model.query_groups
    if options.tensor > heads:
        logger.info(
            "%d key/value heads, %d ranks: each head is on %d of them",
            heads,
            options.tensor,
            options.tensor // heads,
        )
    tolerance = Tolerance(options.tolerance, options.agreement)
    equal = True
    for layers in [*_parts(options, megatron.description)]:
        if layers is not None:
            sys.stdout.write(f"layers              {', '.join(map(str, layers))}\n")
        comparison = compare(
            original, megatron, tokens, parallel=parallel, layers=layers, timeout_seconds=options.timeout
        )
        sys.stdout.write("\n".join(comparison.lines(tolerance)) + "\n")
        sys.stdout.flush()
        equal &= comparison.within(tolerance)
    if not equal:
        raise ProofError(f"{options.hf_path} and {options.megatron_path} differ.")


def _parts(options: argparse.Namespace, description: "ModelDescription") -> Iterator[tuple[int, ...] | None]:
    """The layers to compare, one comparison after the other; None: the whole models."""
    from checkpoints_conversion.layer_subset import parse_layers, runs_of_layers, with_sources

    compression = description.compression
    layer_types = compression.map(description.model.num_layers)
    with_what_they_read = partial(with_sources, layer_types, first_guess=compression.first_guess)
    if options.layers is not None:
        yield with_what_they_read(parse_layers(options.layers, len(layer_types)))
    elif options.layers_at_once is not None and options.layers_at_once < len(layer_types):
        for layers in runs_of_layers(len(layer_types), options.layers_at_once):
            yield with_what_they_read(layers)
    else:
        yield None


def _run_inspect(options: argparse.Namespace) -> None:
    folder = local_folder(options.path)
    from checkpoints_conversion.inspection import facts, lines
    from checkpoints_conversion.opening import open_model

    opened = open_model(
        folder,
        allow_pickle=True,
        vocab_size=options.vocab_size,
        given=dict(map(_argument, options.argument)),
        layer_types=options.layer_types,
    )
    sys.stdout.write(json.dumps(facts(opened), indent=1) if options.json else "\n".join(lines(opened)))
    sys.stdout.write("\n")


def _dtype(name: str) -> "torch.dtype | None":
    from lckv.weights.tensors import dtype_of

    return None if name == "keep" else dtype_of(name, "--dtype")


def _argument(text: str) -> tuple[str, object]:
    """Name and value of --argument NAME=VALUE; the value is read as YAML."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ConfigError(f"--argument is {text}; it must be NAME=VALUE.")
    return name, yaml.safe_load(value)


_RUN = {
    "hf-to-megatron": _run_hf_to_megatron,
    "megatron-to-hf": _run_megatron_to_hf,
    "legacy-to-megatron": _run_legacy_to_megatron,
    "verify": _run_verify,
    "inspect": _run_inspect,
}

if __name__ == "__main__":
    sys.exit(main())
