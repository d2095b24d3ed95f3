"""The plan as the block runs it: what is missing is an error, passes stop where they may, payloads carry what
crosses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lckv.config import CompressionConfig
from lckv.policies.base import KeyValue
from lckv.sharing.journey import Cargo
from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.pipeline_payload import Freight, PipelinePayload
from tests.megatron_ext.model.stages import MAPS, draw_tokens, make_stage, positions_of
from tests.ranks import run_on_ranks


def test_a_missing_source_is_an_error() -> None:
    run_on_ranks(1, check_missing_source)


def check_missing_source() -> None:
    block = make_stage(MAPS["cla"]).decoder
    hidden = torch.zeros(3, 1, 32)
    with pytest.raises(
        ValueError, match="layer 1 reads the keys and values of layer 0, which were not given to it"
    ):
        block.layers[1].self_attention(hidden, None, None)
    with pytest.raises(
        ValueError, match="layer 0 reads the keys and values of layer 0, which were given to it"
    ):
        block.layers[0].self_attention(hidden, KeyValue(hidden, hidden), None)


@pytest.mark.parametrize(
    "options", [{}, {"add_qkv_bias": True, "qk_layernorm": True}], ids=["llama", "bias-and-norm"]
)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_keys_and_values_alone_are_those_of_the_whole_projection(tp: int, options: dict[str, bool]) -> None:
    run_on_ranks(tp, check_keys_values, tp, options)


def check_keys_values(tp: int, options: dict[str, bool]) -> None:
    from functools import partial

    from lckv.policies.base import TokenContext
    from lckv.rope import rotate
    from megatron_ext.model.contexts import LayerContext

    stage = make_stage(MAPS["plain"], ParallelConfig(tensor_model_parallel_size=tp), **options)
    attention = stage.decoder.layers[0].self_attention
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    angles = stage.angles(torch.arange(5)[:, None, None], 5)
    context = LayerContext(TokenContext(partial(rotate, angles=angles)))
    hidden = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(4))
    whole = attention._own(*attention.heads(hidden), context=context).key_value
    alone = attention.keys_values(hidden, context).key_value
    torch.testing.assert_close(alone, whole)
    torch.autograd.grad(alone.key.sum() + alone.value.sum(), attention.linear_qkv.weight)


@pytest.mark.parametrize(("forward_passes", "backward_passes"), [(0, 1), (0, 2), (1, 1), (3, 2)])
def test_layers_run_as_often_as_the_plan_says(forward_passes: int, backward_passes: int) -> None:
    compression = CompressionConfig("0_3_3_3_4_5", forward_passes, backward_passes)
    (calls,) = run_on_ranks(1, count_calls, compression)
    passes = forward_passes + backward_passes
    first = min(1, passes - 1)  # in the first of several passes cyclic layers run their MLP alone
    assert calls["whole"] == [1, passes - first, passes - first, 1, 1, 1]
    assert calls["mlp"] == [1, passes, passes, 1, 1, 1]
    assert calls["kv alone"] == [0, 0, 0, passes - 1, 0, 0]


def count_calls(compression: CompressionConfig) -> dict[str, list[int]]:
    stage = make_stage(compression)
    counts: dict[str, list[int]] = {"whole": [0] * 6, "mlp": [0] * 6, "kv alone": [0] * 6}

    def counted(kind: str, index: int, function):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            counts[kind][index] += 1
            return function(*args)

        return call

    for index, layer in enumerate(stage.decoder.layers):
        layer.forward = counted("whole", index, layer.forward)
        layer._forward_mlp = counted("mlp", index, layer._forward_mlp)
        layer.keys_values = counted("kv alone", index, layer.keys_values)
    tokens = draw_tokens(1, 4)
    stage(tokens, positions_of(tokens), tokens)
    return counts


def test_passes_without_gradient_leave_no_graph() -> None:
    """More of them change the numbers but not what is saved for backward."""
    few, many = (
        run_on_ranks(1, count_saved_bytes, CompressionConfig("0_4_4_4_4_5", m, 1))[0] for m in (1, 6)
    )
    assert few == many


def count_saved_bytes(compression: CompressionConfig) -> int:
    stage = make_stage(compression)
    tokens, saved = draw_tokens(1, 8), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        stage(tokens, positions_of(tokens), tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_after_enough_passes_the_plan_is_exact() -> None:
    """m + b >= T: causality of cyclic layers makes one more token exact in every pass."""
    exact, more = (
        run_on_ranks(1, final_losses, CompressionConfig("0_4_4_4_4_5", passes - 1, 1))[0]
        for passes in (10, 14)
    )
    torch.testing.assert_close(exact, more, rtol=1e-5, atol=1e-5)


def final_losses(compression: CompressionConfig) -> torch.Tensor:
    stage = make_stage(compression)
    tokens = draw_tokens(2, 10)
    return stage(tokens, positions_of(tokens), tokens)[0].losses


class TestPayload:
    @given(
        hidden=st.booleans(),
        sources=st.lists(st.integers(0, 9), unique=True, max_size=3).map(sorted),
        tokens=st.integers(1, 4),
        rows=st.integers(1, 3),
        shards=st.sampled_from([1, 2]),
        columns=st.integers(0, 2),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def test_round_trip(
        self,
        hidden: bool,
        sources: list[int],
        tokens: int,
        rows: int,
        shards: int,
        columns: int,
        dtype: torch.dtype,
    ) -> None:
        hidden = hidden or not sources
        cargo = Cargo(hidden, tuple(sources), tuple(sources[:1]), tuple(sources), lent=tuple(sources[1:]))
        payload = PipelinePayload(
            cargo, 6, sequence_shards=shards, kv_heads=2, head_dim=4, sum_columns=columns
        )
        states = torch.randn(tokens, rows, 6).to(dtype) if hidden else None

        def draw() -> dict[int, KeyValue]:
            shape = (2, tokens * shards, rows, 2, 4)
            return {source: KeyValue(*torch.randn(shape).to(dtype)) for source in (*sources, 11)}

        rates = torch.rand(rows, columns, requires_grad=True) if columns else None
        freight = Freight(states, draw(), draw(), draw(), rates, draw())
        packed = payload.pack(freight)
        assert packed.shape == payload.shape(tokens * shards, rows)
        arrived = payload.unpack(packed, tokens * shards, rows)
        travelled = arrived.sums
        if rates is None:
            assert travelled is None
        else:
            assert torch.equal(travelled, rates), "float32 survives a payload in bfloat16"
            assert torch.equal(torch.autograd.grad(travelled.sum(), rates)[0], torch.ones_like(rates))
        assert (arrived.hidden_states is None) == (states is None)
        assert states is None or torch.equal(arrived.hidden_states, states)
        for name in ("available", "handed", "previous", "lent"):
            sent, came = getattr(freight, name), getattr(arrived, name)
            assert tuple(came) == getattr(cargo, name)
            assert all(torch.equal(came[source].key, sent[source].key) for source in came)
            assert all(torch.equal(came[source].value, sent[source].value) for source in came)

    def test_a_source_that_was_not_kept_is_an_error(self) -> None:
        payload = PipelinePayload(Cargo(True, (2,)), 6, 1, 2, 4)
        with pytest.raises(
            ValueError,
            match=r"layer 2, which this stage does not have; it has those of no layer",
        ):
            payload.pack(Freight(torch.zeros(1, 1, 6), {}, {}, {}, None, {}))

    def test_a_payload_of_another_size_is_an_error(self) -> None:
        payload = PipelinePayload(Cargo(True, (2,)), 6, 1, 2, 4)
        with pytest.raises(
            ValueError,
            match=r"sent 5 numbers, expected 22 for 1 x 1 tokens and the keys and values of layers \[2\]",
        ):
            payload.unpack(torch.zeros(5), 1, 1)
