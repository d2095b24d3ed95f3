"""Work in tokenizer threads: so many at once, so many that wait, so long each; the event loop goes on."""

import asyncio
import threading
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


def test_work_that_takes_too_long_blocks_nobody() -> None:
    gate = threading.Event()

    async def story(tried: TokenizerThreads) -> None:
        slow = asyncio.ensure_future(tried.run(lambda _: gate.wait(20)))
        for _ in range(3):
            assert await tried.run(len) == 1
        with pytest.raises(ApiError, match=r"was not tokenised after 0\.5 seconds") as caught:
            await slow
        assert caught.value.status == 503
        gate.set()
        assert await asyncio.gather(*(tried.run(len) for _ in range(4))) == [1] * 4

    run(story, seconds=0.5)


def test_work_that_nobody_waits_for_is_not_begun() -> None:
    gate, done = threading.Event(), []

    async def story(tried: TokenizerThreads) -> None:
        works = [tried.run(lambda _: gate.wait(20)), tried.run(done.append)]
        assert all(isinstance(e, ApiError) for e in await asyncio.gather(*works, return_exceptions=True))
        gate.set()
        assert await tried.run(len) == 1
        assert not done

    run(story, threads=1, seconds=0.5)
