"""Marks what is expected to fail; an expected failure that passes is an error, and so is one that is never
collected."""

import os
from collections import Counter
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.huggingface_suite.expected_failures import EXPECTED

_HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Strictly expect what stands in `EXPECTED` to fail."""
    own = [item for item in items if item.path.is_relative_to(_HERE)]
    unused = dict(EXPECTED) if own else {}
    for item in own:
        kind = item.nodeid.split("::")[1]
        for place in ((kind, item.name), ("*", item.name)):
            if place in EXPECTED and kind != "TestLlama":
                item.add_marker(pytest.mark.xfail(reason=EXPECTED[place], strict=True))
                unused.pop(place, None)
    if unused and not config.option.keyword:
        raise pytest.UsageError(f"expected_failures.py names tests that there are not: {sorted(unused)}.")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Counts for each map."""
    if config.rootpath != _HERE:
        return
    for outcome in ("passed", "failed", "xfailed", "xpassed", "skipped"):
        kinds = Counter(report.nodeid.split("::")[1] for report in terminalreporter.stats.get(outcome, ()))
        if kinds:
            counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
            terminalreporter.write_line(f"{outcome}: {counts}")
