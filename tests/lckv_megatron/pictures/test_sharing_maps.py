"""Pictures of sharing maps."""

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from lckv.sharing.layer_types import LayerTypes
from lckv_megatron.commands.map_picture import main
from lckv_megatron.layouts import LAYOUTS
from lckv_megatron.pictures.sharing_maps import (
    KV_FILL,
    READER_FILL,
    UPWARD,
    Reads,
    all_reads,
    draw,
    lanes,
    parse,
)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def boxes(figure: Figure) -> list[str]:
    """Fill of each layer's box, from the bottom."""
    found = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    return [to_hex(box.get_facecolor()) for box in sorted(found, key=lambda box: box.get_y())]


def arrows(figure: Figure) -> list[tuple[int, str]]:
    """Layer that each arrow points at, and its colour."""
    return [
        (int(note.xy[1]), to_hex(note.arrow_patch.get_edgecolor()))
        for note in figure.axes[0].texts
        if hasattr(note, "xyann")
    ]


def test_boxes_arrows_and_bracket() -> None:
    figure = draw([parse("0_2_2_3_3")])
    assert boxes(figure) == [KV_FILL, READER_FILL, KV_FILL, KV_FILL, READER_FILL]
    assert arrows(figure) == [(2, UPWARD), (3, KV_FILL)]
    assert texts(figure) == ["0_2_2_3_3", *[f"layer {index}" for index in range(5)], "m + b\npasses"]


def test_a_bracket_for_each_iterated_group_says_how_often() -> None:
    figure = draw([parse("0_3_3_3_6_6_6")], passes="7 + 2")
    assert [text for text in texts(figure) if "passes" in text] == ["7 + 2 passes"] * 2


@pytest.mark.parametrize(
    ("layer_types", "signs"),
    [
        ("0_1", ["computes keys and values"]),
        ("0_0", ["computes keys and values", "computes none", "reads a layer below"]),
        ("0s_1", ["computes keys and values", "sees a window only"]),
        (
            "1_1_1",
            [
                "computes keys and values",
                "computes none",
                "reads a layer below",
                "reads a layer above: iterated",
            ],
        ),
        ("0_1+0", ["computes keys and values", "mixes in those of a layer below"]),
    ],
)
def test_the_legend_explains_what_occurs(layer_types: str, signs: list[str]) -> None:
    assert legend(draw([parse(layer_types)])) == signs


def test_sliding_layers_have_bars() -> None:
    def bars(layer_types: str) -> int:
        return sum(
            not isinstance(patch, FancyBboxPatch) for patch in draw([parse(layer_types)]).axes[0].patches
        )

    assert (bars("0_1_2"), bars("0s_1_2s")) == (0, 6)


def test_several_maps_with_titles() -> None:
    figure = draw([parse("CLA: 0_0"), parse("long: 0_0_0_0")])
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["CLA", "long"]
    widths = [axes.get_position().width for axes in figure.axes]
    assert sum(widths) <= 1.0001


def test_who_reads_whom() -> None:
    assert all_reads(LayerTypes.parse("0_3_3_3_3_5", 6)) == [Reads(3, (1, 2)), Reads(3, (4,))]
    assert [reads.upward for reads in all_reads(LayerTypes.parse("1_1_1", 3))] == [True, False]
    mixing = all_reads(LayerTypes.parse("0_0_2+0_3+0", 4))
    assert mixing == [Reads(0, (1,)), Reads(0, (2, 3), mixed=True)]
    assert all_reads(LayerTypes.parse("0_1_1/0_1+0", 4)) == [
        Reads(1, (2, 3)),
        Reads(0, (3,), mixed=True),
        Reads(0, (2,), values=True),
    ]
    assert lanes(mixing) == [0, 1], "two kinds of lines to one layer do not lie in one lane"


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
def test_lines_in_one_lane_do_not_meet(sources: list[int]) -> None:
    reads = all_reads(LayerTypes.parse("_".join(map(str, sources)), len(sources)))
    chosen = lanes(reads)
    assert sum(len(line.readers) for line in reads) == sum(
        source != index for index, source in enumerate(sources)
    )
    for i, one in enumerate(reads):
        for j, other in enumerate(reads[:i]):
            if chosen[i] == chosen[j] and one.source != other.source:
                assert not set(one.span) & set(other.span)


def test_the_program_writes_a_picture(tmp_path, capsys) -> None:
    output = tmp_path / "new" / "maps.png"
    maps = [f"{layout.name}: {layout.layer_types(8)}" for layout in LAYOUTS]
    assert main([*maps, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    height, width, _ = matplotlib.image.imread(output).shape
    assert 1400 < width < 1800
    assert 700 < height < 1000


@pytest.mark.parametrize(
    ("text", "message"), [("0_x", "entry 1 (character 3) is 'x'"), ("T: 0_5", "reads layer 5")]
)
def test_a_map_that_cannot_be_read(capsys, text: str, message: str) -> None:
    assert main([text]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_that_cannot_be_written(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    assert main(["0_0", "-o", str(tmp_path / "file" / "maps.png")]) == 2
    assert "maps.png cannot be written" in capsys.readouterr().err
