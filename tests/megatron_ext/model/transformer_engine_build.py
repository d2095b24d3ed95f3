"""`python -m tests.megatron_ext.model.transformer_engine_build SOURCES`: the model from Transformer Engine's
own Python modules and from local ones, on the CPU; prints as JSON how their stages differ.

Transformer Engine's compiled extension is replaced by a stub, which is enough to build layers and not to run
them. A process of its own: the stub and the fake process groups end with it.
"""

import functools
import importlib
import importlib.machinery
import json
import os
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist

STUBBED = ("transformer_engine_torch", "einops", "transformer_engine.pytorch.onnx_extensions")
"""The compiled extension, and what is imported and not used to build layers."""
CARD = types.SimpleNamespace(major=9, minor=0, name="H100", multi_processor_count=132, total_memory=80 << 30)
ATTRIBUTES = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "partition_stride": 1,
    "sequence_parallel": False,
    "allreduce": True,
    "shared": False,
    "shared_embedding": False,
}
"""What Megatron and this project read of a parameter, and what they take where it says nothing."""


class Stub(types.ModuleType):
    """A module in which there is everything."""

    __file__ = "stub"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=name))
        return getattr(self, name)


def import_transformer_engine(sources: str) -> types.ModuleType:
    """transformer_engine.pytorch from `sources`, over stubs."""
    sys.path.insert(0, sources)
    sys.modules.update({name: Stub(name) for name in STUBBED})
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # or it looks for CUDA's libraries
    with (
        warnings.catch_warnings(),
        patch.object(torch.cuda, "get_device_properties", lambda *device: CARD),
        patch.object(torch.cuda, "get_device_capability", lambda *device: (CARD.major, CARD.minor)),
    ):
        warnings.simplefilter("ignore")
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        engine = importlib.import_module("transformer_engine.pytorch")
        sys.modules["transformer_engine"].pytorch = engine  # its __init__ gave up where there is no library
    base = importlib.import_module("transformer_engine.pytorch.module.base").TransformerEngineBaseModule
    base.__init__ = _believing_in_cuda(base.__init__)
    return engine


def _believing_in_cuda(start: Any) -> Any:
    """For as long as a layer asks whether there is CUDA."""

    @functools.wraps(start)
    def replacement(*arguments: Any, **options: Any) -> None:
        with patch.object(torch.cuda, "is_available", lambda: True):
            start(*arguments, **options)

    return replacement


@dataclass(frozen=True)
class Case:
    """A model and the place of the rank that is built."""

    name: str
    compression: Any
    ranks: int = 1
    rank: int = 0
    tensor: int = 1
    pipeline: int = 1
    precision: str = "bf16"


@contextmanager
def as_rank(case: Case) -> Iterator[None]:
    """Megatron's groups as that rank has them, on torch's process group that never communicates."""
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ext import cpu

    cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=case.rank, world_size=case.ranks)
    parallel_state.initialize_model_parallel(case.tensor, case.pipeline, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build(case: Case, implementation: str) -> torch.nn.Module:
    """The stage of the case's rank."""
    from megatron_ext.config import ParallelConfig, TrainConfig
    from megatron_ext.model import build as building
    from megatron_ext.model import transformer_config
    from megatron_ext.model.implementation import ImplementationChoice
    from tests.megatron_ext.model.stages import MODEL, VOCAB

    choice = ImplementationChoice(implementation, "tests")
    model = replace(MODEL, qk_layernorm=True, add_qkv_bias=True)
    parallel = ParallelConfig(
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        sequence_parallel=case.tensor > 1,
    )
    with (
        patch.object(building, "choose_implementation", lambda *asked: choice),
        patch.object(transformer_config, "choose_implementation", lambda *asked: choice),
    ):
        return building.build_stage(
            model, case.compression, parallel, TrainConfig(precision=case.precision), vocab_size=VOCAB
        )


def describe(stage: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """By key of the checkpoint: how the tensor is sharded, what its parameter says of itself, its values."""
    from megatron_ext.checkpointing.state import sharded_state

    (entries,) = sharded_state([stage], None).values()
    parameters = {parameter.data_ptr(): parameter for parameter in stage.parameters()}
    described: dict[str, dict[str, Any]] = {}
    for entry in entries.values():
        parameter = parameters.pop(entry.data.data_ptr())
        parts = [entry] if not hasattr(entry, "build") else _parts(entry.build())
        described[entry.key] = {
            "shards": [
                {
                    "key": part.key,
                    "global shape": list(part.global_shape),
                    "local shape": list(part.local_shape),
                    "offset": list(part.global_offset),
                    "fragmentations": part.axis_fragmentations and list(part.axis_fragmentations),
                    "replica": repr(part.replica_id),
                    "other shape allowed": part.allow_shape_mismatch,
                }
                for part in parts
            ],
            "attributes": {name: getattr(parameter, name, value) for name, value in ATTRIBUTES.items()},
            "dtype": str(parameter.dtype),
            "shape": list(parameter.shape),
            "values": parameter.detach().double().flatten().tolist(),
        }
    assert not parameters, "every parameter is in the checkpoint"
    return described


def _parts(built: Any) -> list[Any]:
    return list(built.values()) if isinstance(built, dict) else list(built)


def differences(local: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """One line for each thing that differs."""
    lines = [f"only local: {key}" for key in local.keys() - other.keys()]
    lines += [f"only Transformer Engine: {key}" for key in other.keys() - local.keys()]
    for key in sorted(local.keys() & other.keys()):
        for aspect, value in local[key].items():
            if value != other[key][aspect]:
                shown = "" if aspect == "values" else f" {value} and {other[key][aspect]}"
                lines.append(f"{key}: {aspect}{shown}")
    return lines


def compare(case: Case, engine: types.ModuleType) -> dict[str, Any]:
    """What test_transformer_engine.py looks at."""
    with as_rank(case):
        local, other = build(case, "local"), build(case, "transformer_engine")
        linears = [
            module for module in other.modules() if isinstance(module, engine.Linear | engine.LayerNormLinear)
        ]
        of_local = describe(local)
        return {
            "differences": differences(of_local, describe(other)),
            "keys": len(of_local),
            "linears": len(linears),
            "fused": sum(bool(module.fuse_wgrad_accumulation) for module in linears),
            "told the first micro-batch": sum(
                not module.disable_parameter_transpose_cache for module in linears
            ),
            "modules": sorted({type(module).__module__ for module in linears}),
        }


def cases() -> list[Case]:
    """Each kind of map, both precisions that are mixed, and the shards of two tensor-parallel ranks and of
    two stages."""
    from tests.megatron_ext.model.stages import EVERY_MAP

    alone = [Case(name, compression) for name, compression in EVERY_MAP.items()]
    lckv, dmc = EVERY_MAP["lckv"], EVERY_MAP["lckv x dmc"]
    return [
        *alone,
        *(Case(f"TP 2, rank {rank}", dmc, ranks=2, rank=rank, tensor=2) for rank in range(2)),
        *(
            Case(f"PP 2, rank {rank}", EVERY_MAP["plain"], ranks=2, rank=rank, pipeline=2)
            for rank in range(2)
        ),
        Case("DP 2", lckv, ranks=2, rank=1),
    ]


if __name__ == "__main__":
    transformer_engine = import_transformer_engine(sys.argv[1])
    json.dump({case.name: compare(case, transformer_engine) for case in cases()}, sys.stdout)
