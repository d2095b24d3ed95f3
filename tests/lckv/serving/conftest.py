"""A running application for the tests of a module."""

import time
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from lckv.generation.engine import Engine
from tests.lckv.serving.served_model import make_app, make_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(make_app(engine)) as client:
        yield client
        assert wait_for(lambda: engine.stats().pages_in_use == 0)


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
