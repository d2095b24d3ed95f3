"""Measures memory and time of conversions, for models that grow while their largest tensor stays as it is.

    python -m tools.benchmarks.conversion_memory --output tools/benchmarks/results/conversion_memory.csv

peak_bytes: by how much the resident memory of the converting process grows (Linux), mapped files included.
allowed_bytes: 1.3 times the largest tensor and 64 MiB. cpu_seconds: those in which the process computed; of
use where other programs run meanwhile. ratio_to_copy: to those of reading the weights, hashing and writing
them, by the same process. Models are Llamas in bfloat16 with random weights; what is measured is
reading, mapping, writing and hashing, without the proof at the end. A narrow model has many small tensors:
half a megabyte each at a width of 512, ten at 2048.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.writing import write_huggingface
from lckv.config import CompressionConfig
from lckv.weights.huggingface import SAFETENSORS_NAME
from lckv.weights.tensors import TensorInfo
from lckv_megatron.measuring.timing import setting, write_csv
from megatron_ext.config import ModelConfig

CONSTANT_BYTES = 64 * 2**20
_PIECE_BYTES = 2**20
_COPIES = 3
"""The fastest counts: the first waits for memory."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class RandomWeights:
    """A model's tensors, drawn when they are read: the same small block of random numbers again and again."""

    tensors: Mapping[str, TensorInfo]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name."""
        return self.tensors

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or its rows start:stop."""
        info = self.tensors[name]
        start, stop, _ = (rows or slice(None)).indices(info.shape[0])
        row = torch.randn(info.shape[1:], generator=torch.Generator().manual_seed(start)).to(info.dtype)
        return row.expand(stop - start, *info.shape[1:]).clone()


def model_of(size: int, vocab_size: int, hidden_size: int = 512) -> ModelDescription:
    """A Llama of about `size` bytes, whose largest tensor, the embedding, has `vocab_size` rows."""
    layers = 1
    while True:
        model = ModelConfig(
            num_layers=layers,
            hidden_size=hidden_size,
            ffn_hidden_size=3 * hidden_size,
            num_attention_heads=hidden_size // 64,
            num_query_groups=hidden_size // 128,
            vocab_size=vocab_size,
            max_position_embeddings=2048,
        )
        description = ModelDescription(model, CompressionConfig(), "llama", torch.bfloat16)
        if sum(info.nbytes for info in description.expected_tensors().values()) >= size:
            return description
        layers += 1


def conversions(description: ModelDescription, folder: Path) -> Mapping[str, Callable[[], object]]:
    """By their names, each for the models that the earlier ones have left in `folder`."""
    source, megatron = folder / "source", folder / "megatron"
    changes = {"compression.layer_types": _lckv(description)}
    return {
        "hf-to-megatron": lambda: hf_to_megatron(str(source), megatron, proof="never"),
        "hf-to-megatron, averaged map": lambda: hf_to_megatron(
            str(source), folder / "shared", changes=changes, proof="never"
        ),
        "megatron-to-hf": lambda: megatron_to_hf(megatron, folder / "back", proof="never"),
    }


def write_source(description: ModelDescription, folder: Path) -> None:
    """The model with which `conversions` begin."""
    (folder / "source").mkdir()
    write_huggingface(folder / "source", description, RandomWeights(description.expected_tensors()))


def measure(name: str, description: ModelDescription, folder: Path) -> dict[str, object]:
    """One of `conversions`, by the process that calls."""
    sizes = [info.nbytes for info in description.expected_tensors().values()]
    copying = min(_copy_seconds(folder / "source" / SAFETENSORS_NAME) for _ in range(_COPIES))
    _CLEAR.write_text("5")  # the peak starts anew
    before, start, computing = _status("VmRSS"), time.perf_counter(), time.process_time()
    conversions(description, folder)[name]()
    seconds, computing = time.perf_counter() - start, time.process_time() - computing
    return {
        "conversion": name,
        "hidden_size": description.model.hidden_size,
        "model_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "peak_bytes": _status("VmHWM") - before,
        "allowed_bytes": round(1.3 * max(sizes)) + CONSTANT_BYTES,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(computing, 2),
        "ratio_to_copy": round(computing / copying, 2),
    }


def _copy_seconds(path: Path) -> float:
    """Seconds in which this process computes to read a file, hash it, and write it."""
    start, digest = time.process_time(), hashlib.sha256()
    with path.open("rb", buffering=0) as source, TemporaryFile(dir=path.parent, buffering=0) as target:
        while piece := source.read(_PIECE_BYTES):
            digest.update(piece)
            target.write(piece)
        os.fsync(target.fileno())
        return time.process_time() - start


def _lckv(description: ModelDescription) -> str:
    """All layers but the outer ones read the last but one."""
    layers = description.model.num_layers
    return "_".join(str(min(max(index, layers - 2), layers - 1)) if index else "0" for index in range(layers))


def _status(name: str) -> int:
    """A memory reading of this process, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def measure_in_turn(description: ModelDescription, rounds: int) -> Iterator[dict[str, object]]:
    """All conversions of a model, each by a new process, in which there is nothing yet that it could use
    again. Of each the round whose ratio is the median; `rounds` is odd."""
    with TemporaryDirectory() as folder:
        write_source(description, Path(folder))
        for name in conversions(description, Path(folder)):
            before, rows = set(Path(folder).iterdir()), list[dict[str, Any]]()
            for _ in range(rounds):
                for made in set(Path(folder).iterdir()) - before:  # by the round before
                    shutil.rmtree(made)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append(pool.apply(measure, (name, description, Path(folder))))
            yield sorted(rows, key=itemgetter("ratio_to_copy"))[rounds // 2]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[100, 200, 400, 800], help="sizes of the models"
    )
    parser.add_argument(
        "--hidden-size", type=int, nargs="+", default=[512, 2048], help="widths of the models"
    )
    parser.add_argument(
        "--largest-tensor", type=int, default=40, metavar="MB", help="megabytes of the embedding"
    )
    parser.add_argument(
        "--rounds", type=int, choices=(1, 3, 5), default=3, help="of a conversion; the median counts"
    )
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    if not _CLEAR.exists():
        parser.error(f"peak memory is read from {_STATUS.parent}, which this system does not have.")
    rows: list[dict[str, object]] = []
    for megabytes, hidden_size in product(options.megabytes, options.hidden_size):
        vocab_size = 10**6 * options.largest_tensor // (2 * hidden_size)
        for row in measure_in_turn(model_of(10**6 * megabytes, vocab_size, hidden_size), options.rounds):
            rows.append(row | setting("cpu"))
            print("   ".join(f"{value:>15}" for value in row.values()), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(options.output, rows)


if __name__ == "__main__":
    main()
