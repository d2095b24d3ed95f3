from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.picture import draw


def test_a_map_with_everything() -> None:
    picture = draw(LayerTypes.parse("0s_3_3_3_2_5", 6), window=8)
    assert picture.splitlines() == [
        "layer 5  KV  <- own",
        "layer 4      <- 2 ↓",
        "layer 3  KV  <- own   ┐ iterated",
        "layer 2  KV  <- 3 ↑   │",
        "layer 1      <- 3 ↑   ┘",
        "layer 0  KV  <- own   window 8",
    ]


def test_indices_are_aligned() -> None:
    lines = draw(LayerTypes.parse("_".join(["0"] * 12), 12)).splitlines()
    assert lines[0] == "layer 11      <-  0 ↓"
    assert lines[-1] == "layer  0  KV  <- own"
