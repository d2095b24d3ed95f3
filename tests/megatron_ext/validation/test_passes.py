"""What validation says about how cyclic groups are iterated."""

import pytest

from megatron_ext.validation.run import problems
from tests.megatron_ext.validation.test_run import PP2, p, run_with

LCKV = {"model.num_layers": 4, "compression.layer_types": "0_2_2_3"}
GUESS = LCKV | {"compression.first_guess": True}
AGREEMENT = LCKV | {"compression.agreement_loss_coefficient": 0.5}
RANDOM = {"train.forward_passes_schedule": "random"}

CASES = [
    (
        LCKV | {"train.least_forward_passes": 2},
        (
            "train.least_forward_passes is 2 and train.forward_passes_schedule is constant; every "
            "step then runs compression.forward_passes: leave the former out, or choose another "
            "schedule."
        ),
    ),
    (
        LCKV | RANDOM | {"train.least_forward_passes": -1},
        "train.least_forward_passes is -1; it must be at least 0.",
    ),
    (
        RANDOM | {"model.num_layers": 2},
        (
            "train.forward_passes_schedule is random and compression.layer_types is 0_1, of which no "
            "layer reads a layer above itself, so that nothing is iterated: set the former to "
            "constant."
        ),
    ),
    (
        LCKV | RANDOM | {"train.least_forward_passes": 8},
        (
            "train.forward_passes_schedule is random, train.least_forward_passes is 8 and "
            "compression.forward_passes is 7; the second must be at most the third, which is the most "
            "passes."
        ),
    ),
    (
        AGREEMENT | RANDOM | {"train.least_forward_passes": 0, "compression.backward_passes": 1},
        (
            "train.forward_passes_schedule is random, train.least_forward_passes is 0 and "
            "compression.agreement_loss_coefficient is 0.5; steps with a single pass have none before "
            "it to agree with: raise train.least_forward_passes, or set the last to 0."
        ),
    ),
    (
        GUESS | p(4) | {"model.num_query_groups": 2},
        (
            "compression.first_guess is true, model.num_query_groups is 2 and "
            "parallel.tensor_model_parallel_size is 4; every rank guesses whole key/value heads of "
            "its own: choose a tensor parallel size of at most the number of these heads, or set the "
            "first to false."
        ),
    ),
    (
        GUESS | {"train.activation_offload": "token_wise", "train.offload_tflops": 1.0},
        (
            "compression.first_guess is true and train.activation_offload is token_wise, which keeps "
            "no keys and values of other passes to compare: set one of them to its default."
        ),
    ),
    (
        AGREEMENT | PP2,
        (
            "compression.agreement_loss_coefficient is 0.5 and layers 1 to 2, which are iterated "
            "together, lie on several pipeline stages (parallel.pipeline_model_parallel_size is 2); "
            "their passes are compared on one: give them one stage with "
            "parallel.pipeline_model_parallel_layout, lower the number of stages, or leave the former "
            "out."
        ),
    ),
]


@pytest.mark.parametrize(("settings", "said"), CASES)
def test_what_cannot_work(settings: dict[str, object], said: str) -> None:
    assert problems(run_with(settings), 4) == [said]


@pytest.mark.parametrize(
    "settings",
    [
        GUESS,
        GUESS | PP2 | {"parallel.pipeline_model_parallel_layout": "Ettt|tL"},
        GUESS | p(2) | RANDOM | {"train.least_forward_passes": 0, "compression.backward_passes": 1},
        LCKV | {"train.forward_passes_schedule": "falling", "train.least_forward_passes": 0},
        AGREEMENT | {"train.forward_passes_schedule": "rising"},
    ],
)
def test_what_works(settings: dict[str, object]) -> None:
    assert problems(run_with(settings), 4) == []
