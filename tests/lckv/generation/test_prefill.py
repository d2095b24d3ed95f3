"""When the passes over iterated layers end."""

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch

from lckv.attention.key_bias import KeyBias
from lckv.generation.prefill import Settling
from lckv.models.modeling_lckv_llama import Iteration
from lckv.policies.base import Extension
from tests.lckv.cache.models import contiguous_cache, model, parallel_logits, text


def _settling(
    tolerance: float = 0.1,
    *,
    rows: int = 1,
    counted: torch.Tensor | None = None,
    key_bias: KeyBias | None = None,
) -> Settling:
    return Settling(tolerance, 9, rows, counted, key_bias=key_bias, device=torch.device("cpu"))


def _pass(*rows: float, layer: int = 3, tokens: int = 4) -> Mapping[int, Extension]:
    """Keys and values that are the same in a whole row."""
    filled = torch.tensor(rows)[None, :, None, None].repeat(tokens, 1, 2, 6)
    return {layer: Extension(filled.clone(), filled.clone())}


def test_a_row_settles_when_it_changes_by_less_than_the_tolerance() -> None:
    settling = _settling()
    assert not settling(_pass(1.0), _pass(2.0))
    assert not settling(_pass(2.0), _pass(2.3))
    assert settling(_pass(2.3), _pass(2.5))
    assert settling.passes.tolist() == [5]


def test_rows_settle_by_themselves_and_keep_what_they_had() -> None:
    settling = _settling(rows=2)
    passes = [_pass(*rows) for rows in ((1.0, 1.0), (1.01, 2.0), (5.0, 4.0), (7.0, 4.1))]
    assert [settling(before, after) for before, after in pairwise(passes)] == [False, False, True]
    assert settling.passes.tolist() == [3, 5]
    for tensor in passes[3][3][:2]:
        assert tensor[0, :, 0, 0].tolist() == pytest.approx([1.01, 4.1])


def test_keys_and_values_and_every_layer_have_to_settle() -> None:
    settling = _settling()
    still = _pass(1.0)[3]
    for field in ("key", "value"):
        moved = still._replace(**{field: 2 * getattr(still, field)})
        assert not settling({3: still, 5: still}, {3: still, 5: moved})
    assert settling({3: still, 5: still}, {3: still, 5: still})


def test_padding_does_not_count() -> None:
    counted = torch.tensor([[True, True, False, False]])
    before, after = _pass(1.0), _pass(1.0)
    after[3].key[2:], after[3].value[2:] = 9.0, 9.0
    assert not _settling()(before, after)
    assert _settling(counted=counted)(before, after)


def test_decisions_have_to_be_the_same_however_small_the_rest_of_the_change() -> None:
    before, after = _pass(1.0), _pass(1.0)
    for each in (before, after):
        each[3].key[..., -1] = 0.0
    after[3].key[1, 0, 1, -1] = -5e4
    assert not _settling(key_bias=KeyBias())(before, after)
    after[3].key[1, 0, 1, -1] = 0.0
    assert _settling(key_bias=KeyBias())(before, after)
    after[3].key[3, 0, 1, -1] = -5e4
    assert _settling(key_bias=KeyBias(), counted=torch.tensor([[True, True, True, False]]))(before, after)


def test_another_group_of_layers_begins_anew() -> None:
    settling = _settling()
    assert settling(_pass(1.0), _pass(1.0))
    assert not settling(_pass(1.0, layer=7), _pass(2.0, layer=7))
    assert settling(_pass(2.0, layer=7), _pass(2.0, layer=7))
    assert settling.passes.tolist() == [4]


def _run(name: str, policy: str, tolerance: float, rows: list[list[int]]) -> tuple[Settling, torch.Tensor]:
    built = model(name, policy)
    tokens = torch.tensor(rows)
    settling = Settling(
        tolerance,
        40,
        len(rows),
        None,
        key_bias=built.model.policy.traits.key_bias,
        device=torch.device("cpu"),
    )
    with torch.inference_mode():
        embedded = built.model.embed_tokens(tokens)
        output = built.model.run(embedded, contiguous_cache(built), iteration=Iteration(40, settling))
        assert output.passes == int(settling.passes.max())
        return settling, built.lm_head(output.last_hidden_state)


@pytest.mark.parametrize(
    ("name", "policy"), [("LCKV", "dense"), ("LCKV", "dmc"), ("sandwich", "dense"), ("MLKV", "dmc")]
)
def test_a_smaller_tolerance_takes_more_passes_and_comes_nearer(name: str, policy: str) -> None:
    rows = [text(30, seed) for seed in range(2)]
    exact = torch.stack([parallel_logits(model(name, policy), row) for row in rows])
    passes, errors = [], []
    for tolerance in (0.3, 1e-2, 1e-6):
        settling, logits = _run(name, policy, tolerance, rows)
        passes.append(int(settling.passes.sum()))
        errors.append(float((logits - exact).abs().max()))
    assert passes[0] < passes[1] < passes[2]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize(("name", "policy"), [("LCKV", "dense"), ("sandwich", "dmc")])
def test_a_row_in_a_batch_ends_as_it_would_alone(name: str, policy: str) -> None:
    rows = [text(30, seed) for seed in range(4)]
    together, logits = _run(name, policy, 0.05, rows)
    assert len(set(together.passes.tolist())) > 1
    for number, row in enumerate(rows):
        alone, expected = _run(name, policy, 0.05, [row])
        assert alone.passes[0] == together.passes[number]
        torch.testing.assert_close(logits[number], expected[0], rtol=0, atol=2e-5)
