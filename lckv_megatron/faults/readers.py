"""Reads folders as the programs do; the result is a text that is equal where all that was read is equal."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from checkpoints_conversion.formats.megatron import MegatronCheckpoint
from checkpoints_conversion.formats.megatron_legacy import LegacyCheckpoint
from lckv.generation.loading import load_model
from lckv.tokenizer_files import PROBES
from lckv.weights.huggingface import HuggingFaceFolder
from lckv.weights.json_file import read_json_object
from lckv.weights.tensors import TensorSource
from lckv_megatron.__main__ import main as run_program
from lckv_megatron.faults.materials import VOCABULARY
from lckv_megatron.faults.training import settings, train
from megatron_ext.checkpointing.reading import read_common
from megatron_ext.command_line import parse_run_config
from megatron_ext.data import description, indexed
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ConfigError

Reader = Callable[[Path], str]
FELL_BACK = "older: "
"""In front of what was read of an older checkpoint, with a message that says so."""


def checkpoint(path: Path) -> str:
    """Everything in a checkpoint, or the newest good one of a folder; `FELL_BACK` where that is not the
    newest and a message says so."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("checkpoints_conversion").addHandler(handler)
    opened = MegatronCheckpoint(path)
    random_states = {
        name: str(tensor.tolist())
        for file in sorted((opened.path / "rng").iterdir())
        for name, tensor in load_file(file).items()
    }
    rest = (read_common(opened.path), read_json_object(opened.path / "scheduler.json"), random_states)
    fell_back = any("Falling back" in message for message in warned)
    return (FELL_BACK if fell_back else "") + _digest(_tensors(opened), repr(rest), str(opened.iteration))


def resumed(path: Path) -> str:
    """The iteration from which training goes on, with the whole way of loading."""
    run = settings(checkpoint={"load": str(path)}, train={"train_iters": 3})
    return train(run)


def huggingface(path: Path) -> str:
    """The logits of a model, and what its tokenizer does."""
    model, tokenizer = load_model(path, device="cpu")
    with torch.no_grad():
        logits = model(torch.arange(30)[None]).logits
    ids = [] if tokenizer is None else [tokenizer.encode(text) for text in PROBES]
    return _digest({"logits": logits}, str(ids), str(model.generation_config.to_dict()))


def tokenizer(path: Path) -> str:
    """What a tokenizer does in the preparation of data."""
    loaded = load_tokenizer("huggingface", str(path))
    ids = [loaded.encode(text) for text in PROBES]
    return _digest({}, str(ids), str([loaded.decode(part) for part in ids]), str(loaded.eod))


def pickled(path: Path) -> str:
    """The weights of a folder with pytorch_model.bin."""
    return _digest(_tensors(HuggingFaceFolder(path, allow_pickle=True)))


def legacy(path: Path) -> str:
    """The weights in Megatron's older layout."""
    return _digest(_tensors(LegacyCheckpoint(path, vocab_size=VOCABULARY)))


def dataset(path: Path) -> str:
    """Lengths and tokens of a dataset."""
    prefix = str(path / "corpus")
    info = indexed.read_index(prefix)
    lengths = [part.tolist() for part in indexed.index_lengths(prefix)]
    tokens = [part.tolist() for part in indexed.token_chunks(prefix, info)]
    return _digest({}, str(info), str(lengths), str(tokens), str(description.read_manifest(prefix)))


def run_file(path: Path) -> str:
    """The settings in a run's YAML file."""
    return repr(parse_run_config(["--config", str(path / "run.yaml")]))


def corpus(path: Path) -> str:
    """The tokens of a corpus."""
    made = path.parent / f"{path.name}.out"
    made.mkdir(exist_ok=True)
    words = ["--input", str(path / "corpus*"), "--output-prefix", str(made / "corpus"), "--overwrite"]
    words += [
        "--tokenizer-type",
        "huggingface",
        "--tokenizer-model",
        str(path.parent / "hf"),
        "--workers",
        "1",
    ]
    if run_program(["preprocess", *words]) != 0:
        raise ConfigError("preprocess ended with status 2")
    prefix = str(made / "corpus")
    return _digest(
        {}, str([part.tolist() for part in indexed.token_chunks(prefix, indexed.read_index(prefix))])
    )


def _tensors(source: TensorSource) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.infos()}


def _digest(tensors: Mapping[str, torch.Tensor], *texts: str) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()
