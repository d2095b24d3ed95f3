"""A tiny training on mock data, as a function."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_ext.command_line import config_from_dict
from megatron_ext.validation.run import validate

ITERATIONS = 4
_COMPARED = (".distcp", "common.pt", "scheduler.json", "progress.json")


def settings(**sections: dict[str, Any]) -> dict[str, Any]:
    """A run of a second, with some fields changed."""
    plain: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": 97,
            "hidden_dropout": 0.1,
        },
        "compression": {"layer_types": "0_2_2_3"},
        "train": {
            "train_iters": ITERATIONS,
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "seq_length": 16,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1e-2},
        "data": {"mock": True, "num_workers": 0},
        "logging": {"progress_bar": False},
    }
    return {name: {**plain.get(name, {}), **sections.get(name, {})} for name in {*plain, *sections}}


def train(sections: dict[str, Any], *, rank: int = 0, ranks: int = 1, port: int = 0) -> str:
    """Train as one of `ranks` processes that meet at `port`; returns the iteration that was reached."""
    from megatron_ext.parallel.process_groups import destroy, initialize
    from megatron_ext.training.loop import fit

    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    run = config_from_dict(sections)
    validate(run, ranks)
    initialize(run.parallel, run.train.seed)
    finished = fit(run)
    destroy()
    return str(finished.iteration)


def digest(checkpoints: Path) -> str:
    """What the newest checkpoint of a folder holds of the run, and all names in the folder."""
    name = (checkpoints / "latest").read_text().strip()
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((checkpoints / name).iterdir())
        if path.name.endswith(_COMPARED)
    }
    return json.dumps({"newest": name, "files": hashes, "names": sorted(os.listdir(checkpoints))})
