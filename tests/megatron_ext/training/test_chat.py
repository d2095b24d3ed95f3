"""Training on conversations."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.training import step
from megatron_ext.training.step import NonFiniteLossError
from tests.megatron_ext.data.builders import random_chats, write_chats
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.megatron_ext.training.test_step import BAD_TOKEN, train_with_a_broken_token
from tests.ranks import run_on_ranks
from tests.thinning import thinned

COMPRESSIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "yoco": {"layer_types": "0_1_1_1"},
    "lckv": {"layer_types": "0_2_2_3", "forward_passes": 2, "backward_passes": 2},
    "dmc": {
        "layer_types": "0_1_1_3",
        "policy": {  # merges from the first step
            "name": "dmc",
            "stage": "finetune",
            "target_compression_ratio": 4.0,
            "initial_decision_bias": 0.3,
            "temperature": 0.5,
            "window": 4,
        },
    },
}
REPORTED = ("lm_", "dmc_", "validation", "grad_norm", "merge_rate")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Conversations of very different lengths; a random half of their tokens, of which there are few, is
    learned."""
    return write_chats(
        tmp_path_factory.mktemp("data") / "chats", random_chats(80, vocab_size=20), vocab_size=97
    )


def chat_run(prefix: str, name: str = "plain", **sections: dict[str, Any]) -> RunConfig:
    data = {"mock": False, "format": "chat", "data_path": [prefix], "split": "80,20,0"}
    evaluated = {"eval_interval": 3, "eval_iters": 1, **sections.pop("train", {})}
    data |= sections.pop("data", {})
    return tiny_run(compression=COMPRESSIONS[name], data=data, train=evaluated, **sections)


@pytest.fixture(scope="module")
def alone(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of each kind of model on one process."""
    folder = tmp_path_factory.mktemp("alone")
    files = {name: folder / f"{name}.jsonl" for name in COMPRESSIONS}
    for name, file in files.items():
        run_on_ranks(1, train, logged_to(chat_run(prefix, name), file))
    return files


LAYOUTS = [
    ("tp2", 2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    ("dp2", 2, {"train": {"micro_batch_size": 2}}),
    ("one micro-batch", 1, {"train": {"micro_batch_size": 4}}),
    ("reference attention, recomputed", 1, {
        "model": {"attention_backend": "reference"}, "train": {"recompute_granularity": "full"},
    }),
]  # fmt: skip
PP2 = ("pp2", 2, {"parallel": {"pipeline_model_parallel_size": 2}})
CASES = [(name, *layout) for name in COMPRESSIONS for layout in LAYOUTS]
CASES += [(name, *PP2) for name in ("plain", "yoco", "dmc")]
CASES.append(("dmc", "cp2", 2, {"parallel": {"context_parallel_size": 2}}))


@pytest.mark.parametrize(
    ("name", "layout", "ranks", "sections"), thinned(CASES, 3), ids=lambda value: str(value)[:20]
)
def test_nothing_depends_on_the_layout(
    name: str, layout: str, ranks: int, sections: dict, prefix: str, alone: dict[str, Path], tmp_path: Path
) -> None:
    run_on_ranks(ranks, train, logged_to(chat_run(prefix, name, **sections), tmp_path / "run.jsonl"))
    for expected, report in zip(reports(alone[name]), reports(tmp_path / "run.jsonl"), strict=True):
        assert expected.keys() == report.keys()
        for key in expected:
            if key.startswith(REPORTED):
                assert report[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), key


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_the_loss_falls(name: str, alone: dict[str, Path]) -> None:
    losses = series(alone[name], "lm_loss")
    assert losses[-1] < losses[0]


def test_a_resumed_run_goes_on(prefix: str, alone: dict[str, Path], tmp_path: Path) -> None:
    saving = {"save": str(tmp_path / "run"), "save_interval": 3}
    run_on_ranks(1, train, chat_run(prefix, train={"train_iters": 3}, checkpoint=saving))
    longer = logged_to(chat_run(prefix, checkpoint=saving), tmp_path / "run.jsonl")
    assert run_on_ranks(1, train, longer) == [6]
    assert series(tmp_path / "run.jsonl", "consumed_samples") == [16, 20, 24]
    other = chat_run(prefix, train={"train_iters": 8, "seq_length": 12}, checkpoint=saving)
    with pytest.raises(ConfigError, match=r"train\.seq_length was 24 and is 12"):
        run_on_ranks(1, train, other)


def first_gradients(run: RunConfig) -> tuple[float, int, dict[str, Tensor]]:
    """On a rank: loss and learned tokens of the first step, and the gradients that the optimizer got."""
    taken: list[Any] = []
    train_step = step.train_step

    def stopped(model: Any, optimizer: Any, *arguments: Any, **options: Any) -> Any:
        def keep() -> tuple[bool, float, int]:
            taken.append({name: part.main_grad.clone() for name, part in model.named_parameters()})
            return True, 0.0, 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer, "step", keep)
            result = train_step(model, optimizer, *arguments, **options)
        taken.append((result.lm_loss, result.num_tokens))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_ext.training.iteration.train_step", stopped)
        train(run)
    return (*taken[1], taken[0])


def test_each_learned_token_weighs_the_same(prefix: str) -> None:
    """Whichever micro-batch it is in, though some have many learned tokens and others one."""
    chats = [([*range(1, 25)], [False, *[True] * 23]), ([*range(30, 54)], [False] * 23 + [True])]
    uneven = write_chats(Path(prefix).with_name("uneven"), chats * 4, vocab_size=97)
    results = []
    for ranks, size in ((1, 1), (1, 8), (2, 2)):
        training = {
            "train_iters": 1, "micro_batch_size": size, "global_batch_size": 8, "eval_interval": 0,
        }  # fmt: skip
        run = chat_run(
            uneven,
            train=training,
            data={"split": "1,0,0"},
            optimizer={"lr_warmup_iters": 0},
            parallel={"use_distributed_optimizer": False},
        )
        results.append(run_on_ranks(ranks, first_gradients, run)[0])
    loss, tokens, gradients = results[0]
    assert tokens == 4 * 24
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for other_loss, other_tokens, other in results[1:]:
        assert (other_loss, other_tokens) == (pytest.approx(loss, rel=1e-5), tokens)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_loss_that_is_not_finite_names_the_conversations(tmp_path: Path) -> None:
    chats = random_chats(40, vocab_size=BAD_TOKEN)
    chats[7][0][1] = BAD_TOKEN
    prefix = write_chats(tmp_path / "chats", chats, vocab_size=97)
    run = chat_run(prefix, data={"split": "1,0,0"}, train={"eval_interval": 0, "train_iters": 20})
    with pytest.raises(NonFiniteLossError) as raised:
        run_on_ranks(1, train_with_a_broken_token, run)
    named = re.search(rf"dataset {prefix}, conversations? ([\d, ]+)\)", str(raised.value))
    assert named is not None
    assert "7" in named[1].split(", ")


def test_a_dataset_of_texts_is_refused(prefix: str) -> None:
    run = chat_run(prefix, data={"format": "pretraining"})
    with pytest.raises(ConfigError, match=r"chats holds conversations, but data\.format is pretraining"):
        run_on_ranks(1, train, run)
