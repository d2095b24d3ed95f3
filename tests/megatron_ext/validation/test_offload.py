"""What validation says of activations on the host."""

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.cost import model_shape
from megatron_ext.model.offload_share import OffloadShare
from megatron_ext.summary.lines import host_lines
from megatron_ext.summary.sizes import RunSizes
from megatron_ext.validation.run import problems
from tests.megatron_ext.validation.test_run import run_with

OFF = "and train.activation_offload is none; set the latter to token_wise"
ON = {"train.activation_offload": "token_wise"}
LONG = {
    **ON, "train.seq_length": 2**20, "train.global_batch_size": 1, "model.num_layers": 32,
    "model.hidden_size": 4096, "model.num_attention_heads": 32, "model.num_query_groups": 8,
}  # fmt: skip


def said(changes: dict[str, object]) -> list[str]:
    return problems(run_with(changes), 1)


@pytest.mark.parametrize("more", [{}, {"train.offload_fraction": 0.5}, {"train.offload_fraction": "auto"}])
def test_a_run_that_works(more: dict[str, object]) -> None:
    assert said({**ON, **more}) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train.offload_fraction": 0.5}, f"train.offload_fraction is 0.5 {OFF}"),
        ({"train.offload_host_gib": 4}, f"train.offload_host_gib is 4.0 {OFF}"),
        ({**ON, "train.offload_fraction": 1.5}, "train.offload_fraction is 1.5; it must be from 0 to 1, or"),
        ({**ON, "train.offload_fraction": float("nan")}, "train.offload_fraction is nan; it must be from 0"),
        ({**ON, "train.offload_host_gib": 0}, "train.offload_host_gib is 0.0; it must be a number greater"),
        ({**ON, "train.offload_tflops": -1}, "train.offload_tflops is -1.0; it must be a number greater"),
        (
            {**ON, "train.offload_gigabytes_per_second": 0},
            "train.offload_gigabytes_per_second is 0.0; it must be a number greater",
        ),
        (
            {**ON, "train.recompute_granularity": "full"},
            "train.activation_offload is token_wise and train.recompute_granularity is full; the former",
        ),
        (
            {**ON, "model.hidden_dropout": 0.1},
            "train.offload_fraction is auto and model.hidden_dropout is 0.1; tokens that are computed again",
        ),
        (
            {**LONG, "train.offload_fraction": 1, "train.offload_host_gib": 1024},
            "is 1024, of which 80% can be filled; with a share of 1 the activations of 1,048,576 tokens",
        ),
        ({**LONG, "train.offload_fraction": 1}, "attention outputs and layer inputs alone are more"),
        (LONG, "train.offload_fraction is auto and train.offload_host_gib is 128, of which"),
    ],
)  # fmt: skip
def test_what_cannot_work(changes: dict[str, object], sentence: str) -> None:
    (found,) = said(changes)
    assert sentence in found


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model.fp8": "e4m3"},
            "train.activation_offload is token_wise and model.fp8 is e4m3 in all passes;",
        ),
        (
            {"parallel.tp_comm_overlap": True},
            "train.activation_offload is token_wise and parallel.tp_comm_overlap",
        ),
    ],
)
def test_what_does_not_go_with_it(changes: dict[str, object], sentence: str) -> None:
    assert any(sentence in line for line in said({**ON, **changes}))


def test_dropout_is_fine_where_nothing_is_computed_again() -> None:
    assert said({**ON, "model.hidden_dropout": 0.1, "train.offload_fraction": 1}) == []
    assert said({**ON, "model.attention_dropout": 0.1}) == []


def share_of(run: RunConfig) -> OffloadShare:
    return OffloadShare.of(run, vocab_size=1)


def test_auto_of_a_run() -> None:
    """At a million tokens everything goes to the host, at eight thousand nearly nothing."""
    run = run_with({**LONG, "train.offload_host_gib": 8192})
    assert share_of(run).settings(989.4).share == 1
    short = share_of(run_with({**LONG, "train.seq_length": 8192})).settings(989.4)
    assert short.share < 0.05
    assert short.host_bytes == 128 * 2**30
    stated = run_with({**LONG, "train.seq_length": 8192, "train.offload_tflops": 20})
    assert share_of(stated).settings(989.4).share > 0.5


def test_auto_needs_the_speed() -> None:
    with pytest.raises(
        ConfigError, match="offload_fraction is auto and the peak of this device is not known; set"
    ):
        share_of(run_with(ON)).settings(None)


def test_micro_batches_in_flight_count() -> None:
    four = {**ON, "train.global_batch_size": 8, "parallel.pipeline_model_parallel_size": 4}
    run = run_with({**four, "train.seq_length": 128})
    assert share_of(run).tokens == 4 * 128
    assert share_of(run_with({**ON, "train.seq_length": 128})).tokens == 128


def test_a_run_says_what_goes_to_the_host() -> None:
    run = run_with(
        {**ON, "train.seq_length": 8192, "train.offload_fraction": 0.25, "train.micro_batch_size": 8}
    )
    (line,) = host_lines(sizes_of(run), None)
    needed = share_of(run).settings(None).expected_bytes / 2**30
    assert f"{needed:,.2f} of 128.00 GiB for each rank" in line
    assert line.endswith("of 25% of the tokens")
    (line,) = host_lines(sizes_of(run_with({**ON, "train.offload_tflops": 1})), None)
    assert line.endswith("of 100% of the tokens (auto)")
    assert list(host_lines(sizes_of(run_with({})), None)) == []


def sizes_of(run: RunConfig) -> RunSizes:
    shape = model_shape(run.model, vocab_size=100, seq_length=run.train.seq_length)
    return RunSizes(run, shape, 1, 1000)
