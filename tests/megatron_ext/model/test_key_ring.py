"""Keys and values that go round instead of being gathered: same numbers, what is sent, and what is held."""

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lckv.attention.aten_pairs import AtenCPU
from lckv.config import CompressionConfig
from megatron_ext.model.build import build_stage
from megatron_ext.model.memory import kept_bytes, kept_for_backward, layer_bytes
from megatron_ext.model.policy_statistics import PolicyInputs
from megatron_ext.parallel.key_ring import KeyRing
from megatron_ext.parallel.process_groups import initialize
from tests.megatron_ext.model.stages import MODEL, VOCAB
from tests.megatron_ext.model.test_context_parallel import (
    TOKENS,
    Case,
    batches_of,
    require_the_same,
    sent_in,
    settings_of,
    step_of,
)
from tests.ranks import run_on_ranks
from tools.benchmarks.activation_memory import Step as Kept

RING = Case("plain", communication="ring")
SPLIT = {"tp": 2, "sequence_parallel": True}
CASES = [
    replace(RING, cp=2),
    replace(RING, cp=2, documents="documents", recompute="full"),
    replace(RING, cp=4, documents="documents"),
    replace(RING, cp=4, recompute="selective"),
    replace(RING, cp=2, documents="documents", recompute="selective", **SPLIT),
    replace(RING, cp=2, pp=2),
    replace(RING, cp=4, name="plain nodiag", documents="documents"),
    replace(RING, cp=2, name="plain nodiag", documents="of a token each"),
    replace(RING, cp=2, name="dmc", documents="documents", recompute="selective"),
    replace(RING, cp=4, name="dmc", documents="documents"),
    replace(RING, cp=2, name="dmc", recompute="full", **SPLIT),
    replace(RING, cp=4, name="dmc without window"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_ring_changes_no_number(case: Case) -> None:
    require_the_same(case)


@pytest.mark.parametrize("name", ["plain", "dmc"])
def test_a_ring_is_as_gathering(name: str) -> None:
    ring = replace(RING, name=name, cp=2)
    steps = (run_on_ranks(2, step_of, case) for case in (ring, replace(ring, communication="gather")))
    for sent_round, gathered in zip(*steps, strict=True):
        assert sent_round.loss == pytest.approx(gathered.loss, rel=1e-6)
        for parameter, gradient in sent_round.gradients.items():
            expected = gathered.gradients[parameter]
            assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max(), parameter


ONCE_MORE = replace(RING, cp=2, recompute="full")


@pytest.mark.parametrize("case", [replace(RING, cp=2), replace(RING, cp=4), ONCE_MORE], ids=str)
def test_what_is_sent_are_parts_of_keys_and_values_and_their_gradients(case: Case) -> None:
    layers, hops = MODEL.num_layers, case.cp - 1
    part = TOKENS // case.cp * MODEL.query_groups * 2 * MODEL.head_dim
    forwards = 2 if case.recompute == "full" else 1
    number = layers * hops * (forwards + 2)
    for sent in run_on_ranks(case.cp, sent_in, replace(case, micro_batch_size=1)):
        assert sent == Counter({("send", part): number, ("receive", part): number})


@pytest.mark.parametrize("communication", ["ring", "gather"])
def test_what_is_predicted_to_be_kept_is(communication: str) -> None:
    """By each further layer."""
    case = replace(RING, cp=2, communication=communication)
    parallel, train = settings_of(case)
    few, many = (
        kept_bytes(
            kept_for_backward(CompressionConfig(), layers, range(layers), range(0)),
            replace(MODEL, num_layers=layers), CompressionConfig(), parallel, train,
        )
        for layers in DEPTHS
    )  # fmt: skip
    for before, after in run_on_ranks(2, kept_by_depths, case):
        assert after - before == many - few


DEPTHS = (2, 4)


def kept_by_depths(case: Case) -> list[int]:
    """On every rank: bytes that models of two depths keep for backward."""
    initialize(settings_of(case)[0], seed=1)
    return [kept_by(case, layers) for layers in DEPTHS]


def kept_by(case: Case, layers: int) -> int:
    parallel, train = settings_of(case)
    model = replace(MODEL, num_layers=layers)
    stage = build_stage(model, CompressionConfig(), parallel, train, vocab_size=VOCAB)
    batch = next(batches_of(case))
    policy = PolicyInputs((), None, batch.chunk_rows, 0.0)

    def forward() -> Tensor:
        return stage(batch.tokens, batch.position_ids, batch.labels, policy=policy)[0].total

    step = Kept(forward, list(stage.parameters()))
    step.run()
    return step.saved_bytes()


def test_six_parts_are_predicted_to_go_round() -> None:
    ring, gather = (settings_of(replace(RING, cp=2, communication=way)) for way in ("ring", "gather"))
    plain, train = CompressionConfig(), ring[1]
    rows = TOKENS // 2 * train.micro_batch_size
    part = rows * MODEL.query_groups * 2 * MODEL.head_dim * 4
    joined = rows * MODEL.num_attention_heads * MODEL.head_dim * 4  # outputs of two chunks
    of_ring, of_gather = (layer_bytes(MODEL, plain, way, train) for way, _ in (ring, gather))
    assert of_ring == of_gather - joined + 6 * part


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_never_holds_more_than_three_parts(ranks: int) -> None:
    """Its own, one that arrives and one that leaves; in backward as many gradients, and what is added."""
    for forward, backward in run_on_ranks(ranks, parts_held):
        assert forward == 2, "besides the own part"
        assert backward <= 6, "besides the own part"


def parts_held() -> tuple[int, int]:
    """The most that forward and backward make of the size of a part, and hold at a time."""
    tokens, heads, groups, channels = 12, 6, 2, 8
    query, key, value = (
        torch.randn(tokens, 1, n, channels, requires_grad=True) for n in (heads, groups, groups)
    )
    ring = KeyRing(dist.group.WORLD)
    with Alive(key.numel() + value.numel()) as forward:
        output = ring.attend(
            query, key, value, None, exclude_self=False, biased=False, scale=0.3, pair=AtenCPU()
        )
    assert not forward.alive, "what travels is not kept for backward"
    with Alive(key.numel() + value.numel()) as backward:
        torch.autograd.grad(output.sum(), (query, key, value))
    return forward.most, backward.most


class Alive(TorchDispatchMode):
    """Watches storages of so many numbers in float32."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self._bytes = 4 * numbers
        self.alive: set[int] = set()
        self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(options or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() == self._bytes:
            storage = result.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                weakref.finalize(storage, self.alive.discard, storage._cdata)
            self.most = max(self.most, len(self.alive))
        return result
