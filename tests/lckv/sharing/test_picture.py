from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.picture import draw, list_steps
from lckv.sharing.plan import iteration_plan


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


def test_a_layer_that_mixes() -> None:
    assert draw(LayerTypes.parse("0_1+0_2+1s_2", 4)).splitlines() == [
        "layer 3      <- 2 ↓",
        "layer 2  KV  <- own + 1  window",
        "layer 1  KV  <- own + 0",
        "layer 0  KV  <- own",
    ]


def test_layers_that_read_two() -> None:
    assert draw(LayerTypes.parse("0_1+0_1/0s_1+0", 4)).splitlines() == [
        "layer 3      <- 1 + 0 ↓",
        "layer 2      <- 1 / 0 ↓  window",
        "layer 1  KV  <- own + 0",
        "layer 0  KV  <- own",
    ]


def test_indices_are_aligned() -> None:
    lines = draw(LayerTypes.parse("_".join(["0"] * 12), 12)).splitlines()
    assert lines[0] == "layer 11      <-  0 ↓"
    assert lines[-1] == "layer  0  KV  <- own"


def test_steps_of_a_plan() -> None:
    assert list(list_steps(iteration_plan(LayerTypes.parse("0_1_5_5_4_5_7_7_6", 9), 3, 2))) == [
        "layers 0-1, once",
        "layers 2-5, pass 1 of 5, without gradient, for the next pass: KV of 5; layers 2-3 without attention",
        "layers 2-5, passes 2-3 of 5, without gradient, for the next pass: KV of 5",
        "layers 2-5, pass 4 of 5, with gradient, for the next pass: KV of 5",
        "layers 2-5, pass 5 of 5, with gradient, counts",
        "layers 6-7, pass 1 of 5, without gradient, for the next pass: KV of 7; layer 6 without attention",
        "layers 6-7, passes 2-3 of 5, without gradient, for the next pass: KV of 7",
        "layers 6-7, pass 4 of 5, with gradient, for the next pass: KV of 7",
        "layers 6-7, pass 5 of 5, with gradient, counts",
        "layer 8, once",
    ]
