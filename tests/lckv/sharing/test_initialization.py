import pytest
import torch
from safetensors.torch import load_file

from lckv.sharing.initialization import initial_kv_weight
from lckv.sharing.layer_types import LayerTypes
from tests.golden.lckv_models import FOLDER

SHARED = LayerTypes.parse("0_6_6_6_6_6_6_7", 8)


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize("layer", SHARED.kv_layers)
def test_averages_are_those_of_the_official_code(layer: int, projection: str) -> None:
    tensors = load_file(FOLDER / "init_average.safetensors")
    name = f"model.layers.{{}}.self_attn.{projection}.weight"
    weight = initial_kv_weight(SHARED, layer, lambda source: tensors[name.format(source)], "average", "key")
    torch.testing.assert_close(weight, tensors["converted." + name.format(layer)], atol=1e-6, rtol=0)


def test_copy_takes_the_layers_own_weight() -> None:
    weights = [torch.full((2, 2), float(layer), dtype=torch.bfloat16) for layer in range(8)]
    assert torch.equal(initial_kv_weight(SHARED, 6, weights.__getitem__, "copy", "key"), weights[6])


def test_average_keeps_the_dtype_and_sums_in_float32() -> None:
    weights = [torch.full((1,), 1 + 2**-7 * (layer % 2), dtype=torch.bfloat16) for layer in range(8)]
    average = initial_kv_weight(SHARED, 6, weights.__getitem__, "average", "key")
    assert average.dtype == torch.bfloat16
    assert average.item() in (1.0, 1 + 2**-7)


def test_a_layer_without_keys_and_values_has_no_weight() -> None:
    with pytest.raises(ValueError, match="layer 3 computes no keys and values in 0_6_6_6_6_6_6_7"):
        initial_kv_weight(SHARED, 3, lambda layer: torch.zeros(1), "copy", "key")
