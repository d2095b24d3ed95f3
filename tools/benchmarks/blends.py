"""Times the first build of a blend of many small datasets, and counts the files that stay open, beside
Megatron's own BlendedMegatronDatasetBuilder.

    python -m tools.benchmarks.blends --output tools/benchmarks/results/blends.csv

Both build the indices of the same files on one process, and read one sample for each dataset. cpu_seconds are
those in which the process computed.
"""

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lckv_megatron.measuring.timing import setting, write_csv
from megatron_ext.config import DataConfig, ParallelConfig
from megatron_ext.data.datasets import build_datasets
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.parallel.process_groups import destroy, initialize

SEQ_LENGTH = 32
SAMPLES_OF_DATASET = 10
VOCABULARY = 200


def write_datasets(folder: Path, count: int) -> list[str]:
    """Prefixes of so many datasets of six documents."""
    random, lengths = np.random.default_rng(1), np.full(6, 40, np.int32)
    prefixes = [str(folder / f"d{number}") for number in range(count)]
    for prefix in prefixes:
        with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
            writer.add(random.integers(1, VOCABULARY, lengths.sum()).astype(np.uint16), lengths)
            writer.close()
    return prefixes


def own_build(prefixes: Sequence[str], cache: Path) -> Any:
    """This project's training samples."""
    return build_datasets(
        DataConfig(data_path=tuple(prefixes), split="1", data_cache_path=str(cache)),
        seq_length=SEQ_LENGTH,
        num_samples=(SAMPLES_OF_DATASET * len(prefixes), 0, 0),
        seed=1,
        vocab_size=VOCABULARY,
        eod=None,
    ).train


def megatron_build(prefixes: Sequence[str], cache: Path) -> Any:
    """Megatron's."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LENGTH,
        blend=(list(prefixes), [1.0] * len(prefixes)),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(eod=0, pad=0, vocab_size=VOCABULARY, unique_identifiers={"class": "none"}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [SAMPLES_OF_DATASET * len(prefixes), 0, 0]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


BUILDS: dict[str, Callable[[Sequence[str], Path], Any]] = {
    "megatron": megatron_build,
    "this project": own_build,
}


def measure(name: str, prefixes: Sequence[str], cache: Path) -> dict[str, object]:
    """Builds and reads once; the cache is empty before."""
    before, start, since = len(os.listdir("/proc/self/fd")), time.process_time(), time.perf_counter()
    samples = BUILDS[name](prefixes, cache)
    seconds, waited = time.process_time() - start, time.perf_counter() - since
    for index in range(len(prefixes)):
        samples[index]
    return {
        "datasets": len(prefixes),
        "build": name,
        "cpu_seconds": round(seconds, 2),
        "seconds": round(waited, 2),
        "files_open_after": len(os.listdir("/proc/self/fd")) - before,
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", type=int, nargs="+", default=[300, 1500])
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    initialize(ParallelConfig(), seed=1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in BUILDS:  # what is loaded first does not count
            BUILDS[name](write_datasets(Path(folder), 2), Path(folder) / f"warm-{name}")
        for count in options.datasets:
            place = Path(folder) / str(count)
            place.mkdir()
            prefixes = write_datasets(place, count)
            for name in BUILDS:
                row = measure(name, prefixes, place / name.replace(" ", "-"))
                print(row, flush=True)
                rows.append({**row, **setting("cpu")})
    if options.output:
        write_csv(options.output, rows)
    destroy()


if __name__ == "__main__":
    main()
