"""Named sharing maps."""

import pytest

from lckv.sharing.layer_types import LayerTypes
from lckv_megatron.layouts import LAYOUTS
from lckv_megatron.tables import size, table


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("num_layers", [1, 2, 3, 8, 22, 40])
def test_every_layout_is_a_map_of_any_depth(layout, num_layers: int) -> None:
    assert len(LayerTypes.parse(layout.layer_types(num_layers), num_layers)) == num_layers


def test_maps_of_eight_layers() -> None:
    assert {layout.name: layout.layer_types(8) for layout in LAYOUTS} == {
        "plain": "0_1_2_3_4_5_6_7",
        "CLA": "0_0_2_2_4_4_6_6",
        "YOCO": "0s_1s_2s_3s_4_4_4_4",
        "LCKV (w=2)": "0_6_6_6_6_6_6_7",
        "sandwich-middle": "0_3_3_3_3_3_3_7",
    }


def test_tables_and_sizes() -> None:
    assert list(table([("a", "long"), ("wide", "b")])) == ["a     long", "wide  b"]
    sizes = [size(number) for number in (1, 1023, 1024, 1536 * 1024, 3 * 2**30)]
    assert sizes == ["1 bytes", "1023 bytes", "1.00 KiB", "1.50 MiB", "3.00 GiB"]
