"""The progress bar and its plain lines."""

import io
import logging
import sys

import pytest

from megatron_ext.training.progress import Progress, si, step_line

VALUES = {
    "lm_loss": 3.14159,
    "learning_rate": 3e-4,
    "grad_norm": 1.5,
    "tokens_per_second": 12345.6,
    "mfu": 0.432,
    "current_memory_bytes": 2**30,
    "peak_memory_bytes": 3 * 2**29,
    "iteration_seconds": 0.25,
    "consumed_tokens": 640,
}
LINE = (
    "loss 3.1416 | learning rate 3.000e-04 | gradient norm 1.500 | 12.3k tokens/s | MFU 43.2 % | "
    "memory 1.00 GiB | peak 1.50 GiB"
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"),
        (999, "999"),
        (999.6, "1k"),
        (12345, "12.3k"),
        (1e6, "1M"),
        (2.5e9, "2.5G"),
        (1e12, "1T"),
        (-2000, "-2k"),
    ],
)
def test_si(value, text):
    assert si(value) == text


def test_a_line_has_units_and_only_what_is_known():
    assert step_line(VALUES) == LINE
    assert step_line({"lm_loss": float("nan"), "mfu": "unknown", "other": 1}) == "loss nan"
    learning = {"lm_loss": 2.0, "distillation_loss": 0.0001234567, "grad_norm": 0.00012345}
    assert step_line(learning) == "loss 2.0000 | distillation 0.0001235 | gradient norm 1.23e-04"
    validation = {"validation_loss": 2.0, "validation_perplexity": 7.389}
    assert step_line(validation) == "validation loss 2.0000 | validation perplexity 7.39"


@pytest.mark.parametrize(("enabled", "terminal"), [(True, False), (False, True)])
def test_lines_of_the_log_where_there_is_no_bar(enabled, terminal, monkeypatch, caplog):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(logging.INFO):
        progress = Progress(100, 0, enabled)
        progress.report(10, VALUES)
        progress.report(100, {"lm_loss": 1.0})
        progress.close()
    assert caplog.messages == [
        f"iteration 10/100 | {LINE} | 0.25 s/iteration, 0:00:22 left",
        "iteration 100/100 | loss 1.0000",
    ]
    assert stream.getvalue() == ""


def test_the_bar_goes_on_from_where_the_run_resumes(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress(100, 40, True)
    for iteration in (41, 45, 100):
        progress.report(iteration, VALUES)
    progress.report(100, {"validation_loss": 2.0})
    progress.close()
    shown = stream.getvalue()
    assert "40/100" in shown
    assert "100/100" in shown
    assert "loss 3.1416 | 12.3k tokens/s | MFU 43.2 % | memory 1.00 GiB | peak 1.50 GiB" in shown
    assert "iteration 100: validation loss 2.0000\n" in shown


def test_the_log_is_written_above_the_bar_and_is_itself_again_afterwards(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    root = logging.getLogger()
    handler = logging.StreamHandler(stream)
    root.addHandler(handler)
    before = list(root.handlers)
    progress = Progress(2, 0, True)
    logging.getLogger("somewhere").warning("checkpoint saved")
    progress.report(1, VALUES)
    progress.close()
    assert root.handlers == before
    root.removeHandler(handler)
    assert any(
        line.endswith("checkpoint saved") and "%|" not in line
        for line in stream.getvalue().replace("\r", "\n").split("\n")
    )


def test_closing_twice_is_harmless():
    progress = Progress(2, 0, False)
    progress.close()
    progress.close()
