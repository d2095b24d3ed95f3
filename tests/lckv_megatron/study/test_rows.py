"""Means over seeds, the front, the table and the picture."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lckv_megatron.pictures.front import LOOK, Mark, draw_front
from lckv_megatron.study.rows import Point, Row, front_of, points_of, read_rows, table_of, write_rows
from megatron_ext.errors import ConfigError


def row(model: str, seed: int, kv_bytes: float, loss: float, **others: object) -> Row:
    cells = {
        "model": model,
        "seed": seed,
        "key": f"{model}{seed}",
        "kv_bytes_per_token": kv_bytes,
        "loss": loss,
    }
    return {name: str(value) for name, value in {**cells, **others}.items()}


ROWS = [
    row("plain", 1, 100, 2.0, tokens_per_second=10, tokens_per_slot=1),
    row("small", 1, 50, 2.5, tokens_per_second=30, tokens_per_slot=1),
    row("small", 2, 54, 2.1),
    row("worse", 1, 60, 2.4),
]


def test_points_are_means_over_seeds() -> None:
    plain, small, worse = points_of(ROWS)
    assert (small.loss, small.kv_bytes) == (pytest.approx(2.3), 52.0)
    assert small.spread == pytest.approx(0.2) and plain.spread == 0
    assert [point.model for point in front_of([plain, small, worse])] == ["small", "plain"]


def test_the_table() -> None:
    lines = [*table_of(points_of(ROWS), "plain")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[0] for line in cells[2:]] == ["plain", "worse", "small"]
    small = dict(zip(cells[0], cells[-1], strict=True))
    assert small["loss"] == "2.3000 ± 0.2000" and small["decoding"] == "3.00x" and small["front"] == "yes"
    assert dict(zip(cells[0], cells[3], strict=True))["decoding"] == "-"


def test_a_loss_that_is_not_finite_beats_none() -> None:
    rows = [*ROWS, row("broken", 1, 10, float("nan")), row("a|b", 1, 40, float("inf"))]
    points = points_of(rows)
    assert [point.model for point in front_of(points)] == ["small", "plain"]
    lines = [*table_of(points, "plain")]
    assert lines[-1].startswith("| broken |  | 10 | nan |") and lines[-2].startswith(
        r"| a\|b |  | 40 | inf |"
    )


@pytest.mark.parametrize(
    ("change", "line"), [({"loss": ""}, 3), ({"kv_bytes_per_token": "x"}, 3), ({"key": ""}, 3)]
)
def test_rows_that_are_none_are_refused(change: Row, line: int, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [ROWS[0], ROWS[1] | change])
    with pytest.raises(ConfigError, match=f"rows.csv, line {line}, is no row with a key, a loss and bytes"):
        read_rows(tmp_path / "rows.csv")


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", ROWS)
    read = read_rows(tmp_path / "rows.csv")
    assert [{name: value for name, value in cells.items() if value} for cells in read.values()] == ROWS
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="is not a table of this program"):
        read_rows(tmp_path / "other.csv")
    assert read_rows(tmp_path / "absent.csv") == {}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats(places: list[tuple[int, int]]) -> None:
    points = [Point(str(number), (loss,), size, ()) for number, (size, loss) in enumerate(places)]
    front = front_of(points)
    for point in points:
        beaten = any(
            other.kv_bytes <= point.kv_bytes
            and other.loss <= point.loss
            and (other.kv_bytes, other.loss) != (point.kv_bytes, point.loss)
            for other in points
        )
        twin = any((other.kv_bytes, other.loss) == (point.kv_bytes, point.loss) for other in front)
        assert twin == (not beaten)


def test_names_are_drawn_as_they_are_written() -> None:
    marks = [Mark(name, 10.0, 2.0, 0.0, True) for name in ("$x_{ a$", "$aaa$", "aaa")]
    figure = draw_front(marks, seeds="One seed.")
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    _, dollars, letters = (Text.get_window_extent(text, renderer).width for text in axes.texts)
    assert dollars > 1.3 * letters


def test_names_in_the_picture_cover_nothing() -> None:
    marks = [
        Mark(
            f"model {number} with a name", 1000.0 + 10 * (number % 3), 2.0 + 0.004 * number, 0.01, number == 0
        )
        for number in range(12)
    ]
    with rc_context(LOOK):
        figure = draw_front(marks, seeds="One seed.")
        (axes,) = figure.axes
        renderer = FigureCanvasAgg(figure).get_renderer()
        texts = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert len(texts) == 12
    for number, one in enumerate(texts):
        for other in texts[:number]:
            common = Bbox.intersection(one, other)
            assert common is None or common.width * common.height < 0.15 * one.width * one.height
