"""Training under a KV policy that the product does not know: one that exists only in the tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lckv.config import CompressionConfig
from lckv.policies.config import PolicyConfig, Traits
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.cost import model_shape
from megatron_ext.summary.sizes import RunSizes
from megatron_ext.training.summary import describe
from megatron_ext.validation.run import problems
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.ranks import run_on_ranks
from tests.thinning import thinned

SETTINGS = {"name": "forgetful", "age": 3}
MAPS = {"cla": "0_0_2_2", "lckv": "0_2_2_3"}
REPORTED = ("lm_", "forgetful_", "kept", "validation", "grad_norm", "forgotten/", "key_size/")


def forgetful_run(layer_types: str, **sections: dict[str, Any]) -> RunConfig:
    compression = {"layer_types": layer_types, "forward_passes": 2, "policy": SETTINGS}
    evaluated = {"eval_interval": 3, "eval_iters": 1, **sections.pop("train", {})}
    return tiny_run(compression=compression, train=evaluated, **sections)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of each map on one process."""
    folder = tmp_path_factory.mktemp("alone")
    files = {name: folder / f"{name}.jsonl" for name in MAPS}
    for name, layer_types in MAPS.items():
        run_on_ranks(1, train, logged_to(forgetful_run(layer_types), files[name]))
    return files


def test_it_learns_and_reports(alone: dict[str, Path]) -> None:
    losses = series(alone["cla"], "forgetful_loss")
    assert losses[-1] < losses[0]
    assert series(alone["cla"], "lm_loss")[-1] < series(alone["cla"], "lm_loss")[0]
    assert series(alone["cla"], "kept") == [0.5] * 6
    assert series(alone["cla"], "validation_kept") == [0.5] * 2
    entries = [name for name in reports(alone["lckv"])[0] if "/" in name]
    assert entries == [
        f"{name}/layer_{layer}/head_{head}"
        for name in ("forgotten", "key_size")
        for layer in (0, 2, 3)
        for head in (0, 1)
    ]


LAYOUTS = [
    ("tp2", 2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    ("tp4 with 2 KV heads", 4, {"parallel": {"tensor_model_parallel_size": 4}}),
    ("recompute full", 1, {"train": {"recompute_granularity": "full"}}),
    ("recompute selective", 1, {"train": {"recompute_granularity": "selective"}}),
    ("reference attention", 1, {"model": {"attention_backend": "reference"}}),
]
PP2 = ("pp2", 2, {"parallel": {"pipeline_model_parallel_size": 2}})
CP2 = ("cp2", 2, {"parallel": {"context_parallel_size": 2}})
CASES = [(name, *layout) for name in MAPS for layout in LAYOUTS] + [("cla", *PP2), ("lckv", *CP2)]


@pytest.mark.parametrize(
    ("name", "layout", "ranks", "sections"), thinned(CASES, 2), ids=lambda value: str(value)[:20]
)
def test_nothing_depends_on_the_layout(
    name: str, layout: str, ranks: int, sections: dict, alone: dict[str, Path], tmp_path: Path
) -> None:
    run_on_ranks(ranks, train, logged_to(forgetful_run(MAPS[name], **sections), tmp_path / "run.jsonl"))
    for expected, report in zip(reports(alone[name]), reports(tmp_path / "run.jsonl"), strict=True):
        assert expected.keys() == report.keys()
        for key in expected:
            if key.startswith(REPORTED):
                assert report[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), key


def test_keys_with_channels_of_their_own_cross_stages(alone: dict[str, Path], tmp_path: Path) -> None:
    """Layer 3 reads layer 0, on the other stage, and keys are wider than values."""
    files = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    for stages, file in enumerate(files, 1):
        run = forgetful_run("0_1_2_0", parallel={"pipeline_model_parallel_size": stages})
        run_on_ranks(stages, train, logged_to(run, file))
    losses = [series(file, "lm_loss") for file in files]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    saving = {"save": str(tmp_path / "a"), "save_interval": 3}
    run_on_ranks(1, train, logged_to(forgetful_run("0_0_2_2", checkpoint=saving), tmp_path / "a.jsonl"))
    loading = {"load": str(tmp_path / "a" / "iter_0000003")}
    run_on_ranks(1, train, logged_to(forgetful_run("0_0_2_2", checkpoint=loading), tmp_path / "b.jsonl"))
    for name in ("lm_loss", "forgetful_loss", "grad_norm", "key_size/layer_2/head_1"):
        assert series(tmp_path / "b.jsonl", name) == series(tmp_path / "a.jsonl", name)[3:]


def test_another_policy_is_another_run(tmp_path: Path) -> None:
    short = {"train_iters": 3}
    run = forgetful_run("0_0_2_2", train=short, checkpoint={"save": str(tmp_path / "a")})
    run_on_ranks(1, train, run)
    loading = replace(run.checkpoint, save=None, load=str(tmp_path / "a"))
    dense = replace(run, compression=CompressionConfig("0_0_2_2", forward_passes=2), checkpoint=loading)
    said = r"compression\.policy is dense, but the checkpoint's is forgetful\. To start the next stage"
    with pytest.raises(ConfigError, match=said):
        run_on_ranks(1, train, dense)
    onwards = replace(dense, checkpoint=replace(loading, finetune=True))
    assert run_on_ranks(1, train, onwards) == [3]


def test_what_it_cannot_live_with() -> None:
    run = forgetful_run("0s_1_2_3")
    run = replace(
        run,
        model=replace(run.model, attention_dropout=0.1),
        compression=replace(run.compression, sliding_window=4, policy=replace_age(run.compression.policy, 0)),
    )
    assert [problem.partition(";")[0] for problem in problems(run, 1)] == [
        "compression.policy.age is 0",
        "compression.sliding_window is 4",
        "model.attention_dropout is 0.1, compression.policy.name is forgetful",
    ]


def test_a_policy_that_does_not_say_how_far_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    run = forgetful_run("0_1_2_3", parallel={"context_parallel_size": 2})
    assert problems(run, 2) == []
    monkeypatch.setattr(type(run.compression.policy), "traits", Traits())
    (said,) = problems(run, 2)
    assert said.startswith(
        "parallel.context_parallel_size is 2 and compression.policy.name is forgetful; this policy does not "
        "say how far around a token it looks (Traits.reach)"
    )


def replace_age(policy: PolicyConfig, age: int) -> PolicyConfig:
    return replace(policy, age=age)  # type: ignore[type-var]


def test_the_summary_names_it() -> None:
    run = forgetful_run("0_0_2_2")
    shape = model_shape(run.model, vocab_size=128, seq_length=24)
    text = "\n".join(describe(RunSizes(run, shape, 1, 1), torch.device("cpu")))
    stays = "forgetful: every 2th token stays beyond 3 tokens"
    assert f"KV policy             {stays}: 64 bytes per token" in text
    assert "reported as           forgotten/layer_I/head_J: share of tokens that will be forgotten" in text
