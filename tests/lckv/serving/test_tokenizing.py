"""Work in tokenizer threads: so many at once, so many that wait, so long each; the event loop goes on."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lckv.serving.errors import ApiError
from lckv.serving.tokenizing import TokenizerThreads


def run(
    story: Callable[[TokenizerThreads], Awaitable[None]],
    *,
    threads: int = 2,
    waiting: int = 2,
    seconds: float = 10,
) -> None:
    async def main() -> None:
        tried = TokenizerThreads(["own"], threads=threads, waiting=waiting, seconds=seconds)
        try:
            await story(tried)
        finally:
            tried.stop()

    asyncio.run(main())


def test_results_and_errors_come_back() -> None:
    async def story(tried: TokenizerThreads) -> None:
        assert await tried.run(len) == 1
        with pytest.raises(ApiError, match="no"):
            await tried.run(refuse)

    def refuse(_: Any) -> None:
        raise ApiError(400, "no")

    run(story)


def test_each_thread_has_a_tokenizer_of_its_own() -> None:
    meeting = threading.Barrier(2, timeout=20)

    def identity(tokenizer: Any) -> int:
        meeting.wait()
        return id(tokenizer)

    async def story(tried: TokenizerThreads) -> None:
        assert len(set(await asyncio.gather(tried.run(identity), tried.run(identity)))) == 2

    run(story)


def test_more_than_may_wait_are_told_to_come_back() -> None:
    gate = threading.Event()

    async def story(tried: TokenizerThreads) -> None:
        works = [asyncio.ensure_future(tried.run(lambda _: gate.wait(20))) for _ in range(5)]
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="The server is busy: 4 requests are being read") as caught:
            works[4].result()
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
        gate.set()
        assert await asyncio.gather(*works[:4]) == [True] * 4
        assert await tried.run(len) == 1

    run(story)


def test_work_that_swallows_an_end_is_told_again() -> None:
    ended = threading.Event()

    def stubborn(_: Any) -> None:
        for _ in range(2):
            with contextlib.suppress(BaseException):
                while True:
                    time.sleep(0.001)
        try:
            while True:
                time.sleep(0.001)
        finally:
            ended.set()

    async def story(tried: TokenizerThreads) -> None:
        with pytest.raises(ApiError):
            await tried.run(stubborn)
        assert await asyncio.to_thread(ended.wait, 20)

    run(story, seconds=0.1)


def test_a_loop_without_end_is_ended_and_blocks_nobody() -> None:
    running: set[int] = set()

    def forever(_: Any) -> None:
        running.add(threading.get_ident())
        try:
            while True:
                try:
                    time.sleep(0.001)
                except Exception:
                    continue
        finally:
            running.discard(threading.get_ident())

    async def story(tried: TokenizerThreads) -> None:
        works = [asyncio.ensure_future(tried.run(forever)) for _ in range(2)]
        for work in works:
            with pytest.raises(ApiError, match=r"was not tokenised after 0\.3 seconds") as caught:
                await work
            assert caught.value.status == 503
        for _ in range(3):
            assert await tried.run(len) == 1
        while running:
            await asyncio.sleep(0.01)

    run(story, seconds=0.3)
