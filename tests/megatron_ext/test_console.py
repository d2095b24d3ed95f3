"""Errors that users can mend are one message; others keep their traceback."""

import logging

import pytest

from lckv.errors import ModelError
from megatron_ext.console import exit_status
from megatron_ext.errors import ConfigError


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("set x to 1"), 2),
        (ModelError("mlp_bias is True"), 2),
        (ArithmeticError("the loss is nan"), 1),
    ],
)
def test_messages(error: Exception, status: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert exit_status(lambda: raising(error)) == status
    assert caplog.messages == [f"error: {error}"]


def test_success_and_bugs() -> None:
    assert exit_status(lambda: None) == 0
    with pytest.raises(KeyError):
        exit_status(lambda: raising(KeyError("a bug")))
