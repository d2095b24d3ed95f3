"""Names and shapes of weights are those of transformers' own models."""

import pytest

from lckv.families.registry import FAMILIES
from lckv.weights.tensors import TensorInfo
from tests.lckv.families.tiny_models import CLASSES, SIZES, tiny_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", CLASSES)
def test_names_and_shapes_are_those_of_transformers(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    decoder = FAMILIES[family].read_config(model.config.to_dict())
    expected = {name: TensorInfo(tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    assert FAMILIES[family].tensors(decoder) == expected
    assert decoder.vocab_size == SIZES["vocab_size"]
