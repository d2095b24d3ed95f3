"""Hugging Face's and Megatron's logits of the same tokens, on every layout; weights there and back bit for
bit.

Each model goes through the whole conversion. The cases are chosen so that every family meets every number of
key/value heads per rank - one, several, a part of one - and every kind of map and policy meets tensor and
pipeline parallelism.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.formats.megatron import MegatronCheckpoint
from checkpoints_conversion.megatron_logits import write_logits
from checkpoints_conversion.opening import open_huggingface, open_megatron
from checkpoints_conversion.reference import Reference, reference_folder
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from megatron_ext.checkpointing.save import save_checkpoint
from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.restoring.description import saved_settings
from megatron_ext.restoring.model import restore
from tests.lckv.families.tiny_models import SIZES, saved_model
from tests.ranks import run_on_ranks
from tests.thinning import thinned

MHA, GQA, MQA = 4, 2, 1
TOKENS = np.random.default_rng(0).integers(61, size=(2, 20))
TOLERANCE = 1e-5
"""Share of the largest |logit|: rounding, which iterated layers amplify."""
CYCLIC = {"compression.forward_passes": 3, "compression.backward_passes": 2}
LAYOUTS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
"""TP and PP."""
LARGEST = (4, 2)


@dataclass(frozen=True)
class Case:
    """A Hugging Face model, what a conversion makes of it, and the layouts on which it is tried."""

    family: str
    kv_heads: int
    changes: dict[str, object] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    layouts: Sequence[tuple[int, int]] = ((1, 1), (2, 1), (2, 2))


def shared(layer_types: str, **more: object) -> dict[str, object]:
    return {
        "compression.layer_types": layer_types,
        **{f"compression.{name}": value for name, value in more.items()},
    }


TIED = {"tie_word_embeddings": True}
DMC = {"compression.policy.name": "dmc"}
MERGING = {"name": "dmc", "stage": "finetune", "initial_decision_bias": 0.05, "window": 3}
DROPPING = {
    "name": "dms", "stage": "finetune", "decision_scale": 30.0, "initial_decision_offset": 0.1, "window": 2
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * pair for pair in range(8)],
}  # fmt: skip
"""With `TOKENS`, longer than the original context, by its long factors."""
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 3.0}
CASES = {
    "llama MHA": Case("llama", MHA, layouts=LAYOUTS),
    "llama GQA tied": Case("llama", GQA, settings=TIED, layouts=((2, 1), (2, 2))),
    "mistral MQA window": Case("mistral", MQA, layouts=((1, 1), (4, 1), (1, 2))),
    "qwen2 GQA biases windows": Case("qwen2", GQA, layouts=((1, 1), (4, 1), (2, 2))),
    "qwen2 MQA tied": Case("qwen2", MQA, settings=TIED, layouts=((2, 1), (1, 2))),
    "qwen3 GQA norms": Case("qwen3", GQA, layouts=LAYOUTS),
    "qwen3 MHA tied": Case("qwen3", MHA, settings=TIED, layouts=((4, 1), (1, 2))),
    "CLA": Case("llama", GQA, shared("0_0_2_2"), layouts=LAYOUTS),
    "YOCO": Case("mistral", MHA, shared("0s_1s_2_2"), layouts=((1, 1), (2, 2))),
    "LCKV": Case("llama", GQA, shared("0_2_2_3") | CYCLIC, layouts=LAYOUTS),
    "LCKV MQA biases": Case(
        "qwen2", MQA, shared("0s_2_2_3", sliding_window=6) | CYCLIC, layouts=((1, 1), (4, 1))
    ),
    "LCKV norms tied": Case(
        "qwen3", MHA, shared("0_3_3_3") | CYCLIC, settings=TIED, layouts=((4, 1), (1, 2))
    ),
    "MixAttention without own position": Case(
        "qwen3", GQA, shared("0_1s_1s_3", sliding_window=4, force_nodiag=True), layouts=((2, 1), (1, 2))
    ),
    "DMC stage 1": Case("llama", GQA, DMC, layouts=((1, 1), (4, 1), (2, 2))),
    "DMC stage 1 MQA biases": Case(
        "qwen2", MQA, DMC, {"use_sliding_window": False}, layouts=((4, 1), (1, 2))
    ),
    "merging": Case("lckv-llama", GQA, settings={"compression": {"policy": MERGING}}, layouts=LAYOUTS),
    "merging CLA MQA": Case(
        "lckv-llama",
        MQA,
        settings={"compression": {"layer_types": "0_0_2_2", "policy": MERGING}, "qkv_bias": True},
        layouts=((4, 1), (2, 2)),
    ),
    "merging LCKV": Case(
        "lckv-llama",
        GQA,
        settings={"compression": {"layer_types": "0_2_2_3", "policy": MERGING}, "qk_norm": True, **TIED},
        layouts=LAYOUTS,
    ),
}
CASES |= {
    "dropping": Case(
        "lckv-llama",
        GQA,
        settings={"compression": {"layer_types": "0_1_2_2", "policy": DROPPING}, "qk_norm": True},
        layouts=((1, 1), (4, 1), (2, 2)),
    ),
    "dropping by an adapter": Case(
        "lckv-llama",
        GQA,
        settings={
            "compression": {"layer_types": "0_1_2_2", "policy": {**DROPPING, "decision_source": "adapter"}},
            "qkv_bias": True,
        },
        layouts=((4, 1), (2, 2)),
    ),
    "an adapter from plain": Case(
        "qwen3", GQA,
        shared("0_0_2_2", **{"policy.name": "dms", "policy.stage": "retrofit",
                             "policy.decision_source": "adapter"}),
        layouts=((2, 1),),
    ),
    "DMS stage 1": Case("qwen3", GQA, {"compression.policy.name": "dms"}, layouts=((2, 1),)),
    "yarn": Case(
        "llama", GQA,
        settings={"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0,
                  "original_max_position_embeddings": 16}},
        layouts=((1, 1), (2, 2)),
    ),
    "guess": Case(
        "lckv-llama", GQA,
        settings={"compression": {"layer_types": "0_2_2_3", "first_guess": True, "forward_passes": 1}},
        layouts=((1, 1), (2, 1)),
    ),
    "mixed": Case(
        "lckv-llama", GQA,
        settings={"compression": {"layer_types": "0_1+0_2+1_2", "policy": MERGING}},
        layouts=((4, 1), (2, 2)),
    ),
    "mixed from plain": Case("qwen3", GQA, shared("0_1+0_1/0_1+0"), layouts=((1, 2),)),
    "two sources": Case(
        "lckv-llama", GQA,
        settings={"compression": {"layer_types": "0_1_1/0_1+0"}}, layouts=((4, 1), (2, 2)),
    ),
    "longrope": Case("llama", GQA, settings={"rope_parameters": LONGROPE}, layouts=((1, 1),)),
    "dynamic": Case(
        "qwen3", GQA, settings={"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
        layouts=((1, 1),),
    ),
    "longrope LCKV": Case(
        "llama", GQA, shared("0_2_2_3") | CYCLIC, {"rope_parameters": LONGROPE}, layouts=((1, 1),)
    ),
    "merging dynamic": Case(
        "lckv-llama", GQA,
        settings={"compression": {"policy": MERGING}, "rope_parameters": DYNAMIC,
                  "max_position_embeddings": 16},
        layouts=((1, 2),),
    ),
}  # fmt: skip
RESHARDED = ("llama MHA", "qwen2 MQA tied", "qwen3 GQA norms", "LCKV MQA biases", "merging CLA MQA")


def logits_on_ranks(models: Sequence[tuple[str, Path]], folder: Path, parallel: ParallelConfig) -> None:
    """On every rank: of each model into a file of its name."""
    from megatron.core import parallel_state

    for name, path in models:
        write_logits(path, TOKENS, folder / f"{name}.npy", parallel, torch.float32)
        parallel_state.destroy_model_parallel()


def save_merging_model(folder: Path, settings: dict[str, Any]) -> None:
    """A model of this project's class, all of whose weights are random."""
    torch.manual_seed(1)
    model = LCKVLlamaForCausalLM(LCKVLlamaConfig(**{**SIZES, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
            if name.endswith(("key_weight", "value_weight")):
                parameter /= 35
    model.save_pretrained(folder)


class Matrix:
    """All models converted, and all their logits, computed once."""

    def __init__(self, folder: Path, cases: dict[str, Case]) -> None:
        self.folder, self.cases = folder, cases
        self.expected: dict[str, np.ndarray] = {}
        for name, case in cases.items():
            settings = {"num_hidden_layers": 4, "num_key_value_heads": case.kv_heads, **case.settings}
            self._convert(name, case, settings)
        for layout in LAYOUTS:
            self.compute(layout, [name for name, case in cases.items() if layout in case.layouts])

    def compute(self, layout: tuple[int, int], names: Sequence[str]) -> None:
        """Logits of these models on a layout, TP and PP."""
        tensor, pipeline = layout
        self.found_folder(layout).mkdir()
        parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
        models = [(name, self.checkpoint(name)) for name in names]
        run_on_ranks(tensor * pipeline, logits_on_ranks, models, self.found_folder(layout), parallel)

    def check(self, layout: tuple[int, int], name: str) -> None:
        """What was computed is what Hugging Face's model computes."""
        found, expected = np.load(self.found_folder(layout) / f"{name}.npy"), self.expected[name]
        assert found.shape == expected.shape
        allowed = TOLERANCE * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=allowed, err_msg=f"TP and PP {layout}")
        assert (found.argmax(-1) == expected.argmax(-1)).all()

    def hugging_face(self, name: str) -> Path:
        return self.folder / "hf" / name

    def checkpoint(self, name: str) -> Path:
        return self.folder / "megatron" / name / "iter_0000000"

    def found_folder(self, layout: tuple[int, int]) -> Path:
        return self.folder / "{} {}".format(*layout)

    def _convert(self, name: str, case: Case, settings: dict[str, Any]) -> None:
        source = self.hugging_face(name)
        if case.family == "lckv-llama":
            save_merging_model(source, settings)
        else:
            saved_model(source, case.family, **settings)
        target = self.checkpoint(name).parent
        hf_to_megatron(str(source), target, changes=case.changes, proof="never")
        with reference_folder(open_huggingface(source), open_megatron(target)) as folder:
            reference = Reference(folder, torch.float32)
            self.expected[name] = torch.stack(
                [reference.logits(row) for row in torch.from_numpy(TOKENS)]
            ).numpy()


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Of the models that are tried in this session."""
    here = [item for item in request.session.items if item.path == request.path]
    tried = {item.callspec.params["name"] for item in here if hasattr(item, "callspec")}
    names = [name for name in CASES if name in {*tried, *RESHARDED, "merging"}]
    return Matrix(tmp_path_factory.mktemp("parity"), {name: CASES[name] for name in names})


@pytest.mark.parametrize("name", thinned(CASES, 2))
def test_logits(matrix: Matrix, name: str) -> None:
    expected = matrix.expected[name]
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    for layout in CASES[name].layouts:
        matrix.check(layout, name)


def test_tokens_are_merged(matrix: Matrix) -> None:
    """Or these cases would say nothing."""
    model = LCKVLlamaForCausalLM.from_pretrained(matrix.hugging_face("merging")).eval()
    rates = model(torch.from_numpy(TOKENS), use_cache=False).statistics["merge_rate"]
    assert 0.1 < rates.mean() < 0.9


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    opened = MegatronCheckpoint(checkpoint)
    return {name: opened.read(name) for name in opened.infos()}


@pytest.mark.parametrize("name", thinned(CASES, 3))
def test_there_and_back(matrix: Matrix, name: str, tmp_path: Path) -> None:
    first, back, again = matrix.checkpoint(name), tmp_path / "back", tmp_path / "again"
    megatron_to_hf(first, back, proof="never")
    if not CASES[name].changes:
        assert_same(weights(back), weights(matrix.hugging_face(name)))
    hf_to_megatron(str(back), again, proof="never")
    assert_same(whole(again), whole(first))
    before, after = (MegatronCheckpoint(path).description for path in (first, again))
    assert (after.model, after.compression.policy, after.dtype) == (
        before.model,
        before.compression.policy,
        before.dtype,
    )
    assert str(after.compression.map(4)) == str(before.compression.map(4))
    assert after.token_ids == before.token_ids


def save_resharded(models: Sequence[tuple[Path, Path]], ranks: int) -> None:
    """On every rank: load each model and save it again, on so many tensor-parallel ranks."""
    parallel = ParallelConfig(tensor_model_parallel_size=ranks)
    initialize(parallel, seed=1)
    for source, target in models:
        stage = restore(source, parallel).stage
        settings = saved_settings(source)
        progress = {"iteration": 1, "consumed_samples": 0, "consumed_tokens": 0}
        save_checkpoint(
            target, 1, model=[stage], optimizer=None, scheduler=None, progress=progress, config=settings
        )


def test_resharding_changes_nothing(matrix: Matrix, tmp_path: Path) -> None:
    """TP 1 -> 4 -> 2, without an optimizer."""
    folders = [matrix.folder / "megatron", tmp_path / "4", tmp_path / "2"]
    for ranks, source, target in ((4, *folders[:2]), (2, *folders[1:])):
        run_on_ranks(ranks, save_resharded, [(source / name, target / name) for name in RESHARDED], ranks)
    for name in RESHARDED:
        assert_same(whole(folders[2] / name), whole(folders[0] / name))


@pytest.mark.nightly
def test_logits_on_eight_ranks(matrix: Matrix) -> None:
    names = [name for name, case in matrix.cases.items() if case.layouts is LAYOUTS]
    matrix.compute(LARGEST, names)
    for name in names:
        matrix.check(LARGEST, name)
