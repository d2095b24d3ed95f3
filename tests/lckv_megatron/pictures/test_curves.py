"""Curves of runs from their metrics files."""

import json
import math
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv_megatron.commands.plot import main
from lckv_megatron.pictures.curves import Style, plot
from lckv_megatron.pictures.end_labels import spread
from lckv_megatron.pictures.heat_map import last_statistics
from lckv_megatron.pictures.runs import Run, read_runs
from lckv_megatron.pictures.smoothing import exponential
from megatron_ext.errors import ConfigError
from megatron_ext.training.metrics import json_line

STYLE = Style("iteration", 0.0)


def reports(count=5, *, validation=True):
    lines = []
    for iteration in range(1, count + 1):
        step = {"lm_loss": 10 / iteration, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1e5}
        lines.append(json_line(iteration, {**step, "consumed_tokens": 64 * iteration}))
        if validation and iteration % 2 == 0:
            lines.append(json_line(iteration, {"validation_loss": 11 / iteration}))
    return lines


def make_run(directory: Path, lines=None, name="metrics.jsonl") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text("".join(reports() if lines is None else lines))
    return directory / name


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_names_are_drawn_as_they_are_written(tmp_path):
    for name in ("$x_{ a$", "$b$"):
        make_run(tmp_path / name)
    assert main([str(tmp_path / "$x_{ a$"), str(tmp_path / "$b$"), "--output", str(tmp_path / "a.png")]) == 0


def test_a_picture_of_two_runs(tmp_path, capsys):
    make_run(tmp_path / "plain")
    make_run(tmp_path / "lckv", [*reports(), '{"iteration": 6, "lm_'])  # still being written
    output = tmp_path / "curves.png"
    options = ["--x", "consumed_tokens", "--smoothing", "0.5", "--start", "64", "-o", str(output)]
    assert main([str(tmp_path / "plain"), str(tmp_path / "lckv" / "metrics.jsonl"), *options]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    height, width, _ = matplotlib.image.imread(output).shape
    assert width > 1200
    assert height > 800


def test_panels_legend_and_units(tmp_path):
    figure = plot(read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")]), STYLE)
    assert titles(figure) == ["Loss", "Learning rate", "Gradient norm", "Speed"]
    assert legend(figure) == ["a", "b"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["iteration"] * 4
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "cross-entropy (nats per token)",
        "learning rate",
        "gradient norm before clipping",
        "tokens per second",
    ]


def test_the_curves_are_the_reports(tmp_path):
    figure = plot(read_runs([make_run(tmp_path / "a")]), STYLE)
    curves = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[iteration, 10 / iteration] for iteration in range(1, 6)] in curves
    assert [[2, 5.5], [4, 2.75]] in curves


def test_panels_without_values_are_left_out(tmp_path):
    lines = [json_line(iteration, {"lm_loss": 1.0}) for iteration in (1, 2)]
    figure = plot(read_runs([make_run(tmp_path / "a", lines)]), STYLE)
    assert titles(figure) == ["Loss"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training"]


def test_memory_is_that_in_use_and_its_peak(tmp_path):
    sizes = ((1, 2**30, 2**31), (2, 3 * 2**30, 2**32))
    lines = [
        json_line(step, {"current_memory_bytes": now, "peak_memory_bytes": most}) for step, now, most in sizes
    ]
    (axes,) = plot(read_runs([make_run(tmp_path / "a", lines)]), STYLE).axes
    assert axes.get_title() == "Memory"
    curves = [line.get_ydata().tolist() for line in axes.lines if len(line.get_ydata())]
    assert curves == [[2**30, 3 * 2**30], [2**31, 2**32]]
    assert axes.yaxis.get_major_formatter()(3 * 2**29) == "1.5"


def test_validation_is_placed_by_the_tokens_of_its_iteration(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a")])
    assert run.series("validation_loss", "consumed_tokens") == ([128, 256], [5.5, 2.75])
    assert run.series("validation_loss", "consumed_tokens", start=200) == ([256], [2.75])


def test_values_that_were_not_finite_leave_a_gap(tmp_path):
    lines = [
        json_line(1, {"lm_loss": 3.0}),
        json_line(2, {"lm_loss": math.nan}),
        json_line(3, {"lm_loss": 1.0}),
    ]
    (run,) = read_runs([make_run(tmp_path / "a", lines)])
    assert run.series("lm_loss", "iteration") == ([1, 2, 3], [3.0, pytest.approx(math.nan, nan_ok=True), 1.0])


def test_operations_are_added_up_over_stages(tmp_path):
    """Operations per token are those that the report's speed tells: 2 TFLOP/s at 1e6 tokens/s are 2e6."""
    step = {"lm_loss": 1.0, "tokens_per_second_per_device": 1e6}
    lines = [
        json_line(1, {**step, "model_tflops_per_device": 2.0, "consumed_tokens": 100}),
        json_line(1, {"validation_loss": 7.0, "consumed_tokens": 100}),
        json_line(2, {**step, "model_tflops_per_device": 3.0, "consumed_tokens": 150}),
    ]
    (run,) = read_runs([make_run(tmp_path / "a", lines)])
    assert run.series("lm_loss", "flops") == ([200e6, 350e6], [1.0, 1.0])
    assert run.series("validation_loss", "flops") == ([200e6], [7.0])


def test_the_last_values_are_written_beside_the_curves(tmp_path):
    """Of the validation where there is one, else of the smoothed training."""
    files = [make_run(tmp_path / "a"), make_run(tmp_path / "b", reports(validation=False))]
    figure = plot(read_runs(files), Style("iteration", 0.5))
    written = [text.get_text() for text in figure.axes[0].texts]
    training = exponential([10 / iteration for iteration in range(1, 6)], 0.5)[-1]
    assert sorted(written) == sorted(["2.750", f"{training:#.4g}"])
    speed = next(axes for axes in figure.axes if axes.get_title() == "Speed")
    assert [text.get_text() for text in speed.texts] == ["100k", "100k"]


@given(st.lists(st.floats(-1e3, 1e3)).map(sorted), st.floats(0.1, 50))
def test_labels_are_moved_apart_and_no_further(places, distance):
    moved = spread(places, distance)
    assert len(moved) == len(places)
    assert all(second - first > distance * (1 - 1e-6) for first, second in pairwise(moved))
    assert sum(moved) == pytest.approx(sum(places), abs=1e-6 * max(1, len(places)) * 1e3)
    if all(second - first >= distance for first, second in pairwise(places)):
        assert moved == pytest.approx(places)


def test_long_curves_are_smoothed_unless_the_style_says_otherwise(tmp_path):
    lines = [json.dumps({"iteration": i, "lm_loss": 3 - i / 200 + (-1) ** i / 10}) + "\n" for i in range(200)]
    (run,) = read_runs([make_run(tmp_path / "a", lines)])

    def drawn(style: Style) -> list[list[float]]:
        lines = plot([run], style).axes[0].lines
        return [list(line.get_ydata()) for line in lines if len(line.get_ydata()) > 1]

    points = run.series("lm_loss", "iteration")[1]
    behind, smoothed = drawn(Style("iteration"))
    assert behind == points and Style("iteration").last(run, "lm_loss") == smoothed[-1]
    assert max(abs(value - (3 - i / 200)) for i, value in enumerate(smoothed)) < 0.06  # of 0.1
    assert drawn(Style("iteration", 0.0)) == [points]
    assert len(drawn(Style("iteration", 0.5))) == 2
    (run,) = read_runs([make_run(tmp_path / "b", lines[:99])])
    assert len(drawn(Style("iteration"))) == 1


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["a/metrics.jsonl", "b/metrics.jsonl"], ["a", "b"]),
        (["a/x/metrics.jsonl", "b/x/metrics.jsonl"], ["a/x", "b/x"]),
        (["a/first.jsonl", "a/second.jsonl"], ["first", "second"]),
        (["a/metrics.jsonl"], ["a"]),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(tmp_path, places, names):
    files = [make_run((tmp_path / place).parent, name=Path(place).name) for place in places]
    assert [run.name for run in read_runs(files)] == names


def test_the_same_run_twice_has_one_name(tmp_path):
    file = make_run(tmp_path / "a")
    assert [run.name for run in read_runs([file, file.parent])] == ["a", "a"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "metrics.jsonl cannot be read: No such file or directory; give a metrics file"),
        ([], "metrics.jsonl has no reports yet"),
        (["no json\n", *reports()], "metrics.jsonl, line 1 is no report of a run"),
        ([json_line(1, {"other": 1})], "no report from iteration 0 on has one of lm_loss, validation_loss"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, capsys, lines, message):
    if lines is not None:
        make_run(tmp_path, lines)
    output = tmp_path / "curves.png"
    assert main([str(tmp_path), "-o", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert not output.exists()


def test_a_picture_that_cannot_be_written(tmp_path, capsys):
    assert main([str(make_run(tmp_path)), "-o", str(tmp_path / "none" / "curves.png")]) == 2
    assert "curves.png cannot be written: No such file or directory." in capsys.readouterr().err


def test_a_smoothing_out_of_range(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(make_run(tmp_path)), "--smoothing", "1"])
    assert "argument --smoothing: 1 is not in [0, 1)" in capsys.readouterr().err


def test_nothing_to_draw_is_said_by_plot_itself():
    with pytest.raises(ConfigError, match="no report from consumed_tokens 5 on has one of"):
        plot([Run("a", [{"iteration": 1, "lm_loss": 1.0}])], Style("consumed_tokens", 0.0, 5))


def test_every_statistic_gets_a_heat_map_of_its_last_report(tmp_path: Path) -> None:
    rates = {
        f"merge_rate/layer_{layer}/head_{head}": 0.25 * (layer + head) for layer in (0, 2) for head in (0, 1)
    }
    first = {"iteration": 1, "compression_ratio": 1.0, **dict.fromkeys(rates, 0.0)}
    last = {
        "iteration": 2,
        "compression_ratio": 2.0,
        "target_compression_ratio": 2.0,
        **rates,
        "merge_rate/layer_2/head_1": None,
        "age/layer_0/head_0": 7.5,
    }
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(report) + "\n" for report in (first, last)))
    (run,) = read_runs([path])
    statistics = last_statistics(run.reports)
    assert math.isnan(statistics["merge_rate"].pop((2, 1)))
    assert statistics == {"merge_rate": {(0, 0): 0.0, (0, 1): 0.25, (2, 0): 0.5}, "age": {(0, 0): 7.5}}
    figure = plot([run], Style("iteration", 0.0))
    titles = [axes.get_title() for axes in figure.axes]
    assert "Compression" in titles
    for name in ("merge_rate", "age"):
        assert [title for title in titles if f"{name} at the end" in title]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"0", "0.25", "0.5", "7.5"} <= set(texts)
