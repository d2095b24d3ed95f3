"""Heads that classify, and what traces the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import lckv.models  # noqa: F401
from tests.lckv.models.test_modeling import ANY
from tests.lckv.models.tiny import CYCLIC, MAPS, PLAIN, SHARED, close, config, model, tokens

IDS = tokens(2, 7)
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
HEADS: list[tuple[Any, dict[str, Tensor]]] = [
    (AutoModelForSequenceClassification, {"labels": torch.tensor([2, 0])}),
    (AutoModelForTokenClassification, {"labels": IDS % 3}),
    (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.ones(2).long(), "end_positions": IDS[:, 1] % 7},
    ),
]


def classifier(auto_class: Any, layer_types: str | None, policy: Any = None) -> Any:
    torch.manual_seed(0)
    one = config(layer_types, policy, forward_passes=2)
    one.num_labels = 3
    return auto_class.from_config(one)


@pytest.mark.parametrize(("layer_types", "policy"), ANY)
@pytest.mark.parametrize(("auto_class", "labels"), HEADS)
def test_every_head_learns(auto_class: Any, labels: dict[str, Tensor], layer_types: Any, policy: Any) -> None:
    one = classifier(auto_class, layer_types, policy)
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = one(IDS, attention_mask=MASK, **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(("auto_class", "labels"), HEADS)
def test_saved_and_loaded(auto_class: Any, labels: dict[str, Tensor], tmp_path: Path) -> None:
    one = classifier(auto_class, SHARED).eval()
    one.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is type(one)
    close(again(IDS, **labels).loss, one(IDS, **labels).loss)
    base = model(SHARED)
    base.save_pretrained(tmp_path / "base")
    headed = auto_class.from_pretrained(tmp_path / "base")
    assert torch.equal(headed.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


def test_a_sequence_is_classified_by_its_last_token() -> None:
    one = classifier(AutoModelForSequenceClassification, CYCLIC).eval()
    ids = IDS.masked_fill(MASK == 0, one.config.pad_token_id)
    alone = one(ids[:1, :5]).logits[0]
    close(one(ids, attention_mask=MASK).logits[0], alone)
    close(one.score(one.model(ids[:1, :5]).last_hidden_state[0, -1]), alone)
    with pytest.raises(TypeError, match="got the argument attention_msk"):
        one(ids, attention_msk=MASK)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer_types", MAPS)
def test_export(layer_types: str | None, masked: bool) -> None:
    """A graph that serves other tokens and other padding."""
    one = model(layer_types, forward_passes=1, backward_passes=1)
    inputs = {"input_ids": IDS, **({"attention_mask": torch.ones_like(MASK)} if masked else {})}
    with torch.no_grad():
        graph = torch.export.export(one, (), {**inputs, "use_cache": False}).module()
        for mask in (MASK, MASK.flip(1), torch.ones_like(MASK)) if masked else (None,):
            ids = tokens(2, 7, seed=3)
            given = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}
            found = graph(**given, use_cache=False).logits
            expected = one(**given, use_cache=False).logits
            kept = torch.ones(2, 7).bool() if mask is None else mask.bool()
            close(found[kept], expected[kept])


def test_export_with_positions_and_a_dynamic_length() -> None:
    one = model(PLAIN)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {
        "input_ids": {1: length},
        "attention_mask": {1: length},
        "position_ids": {1: length},
        "use_cache": None,
    }
    given = {"input_ids": IDS, "attention_mask": MASK, "position_ids": torch.arange(7).expand(2, -1)}
    with torch.no_grad():
        graph = torch.export.export(one, (), {**given, "use_cache": False}, dynamic_shapes=shapes).module()
        longer = {
            "input_ids": tokens(2, 11),
            "attention_mask": torch.ones(2, 11, dtype=torch.int64),
            "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]]).expand(2, -1),
        }
        close(graph(**longer, use_cache=False).logits, one(**longer, use_cache=False).logits)
