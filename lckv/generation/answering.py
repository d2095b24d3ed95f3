"""Any number of prompts through an engine whose queue is limited."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from lckv.generation.engine import Engine
from lckv.generation.requests import Completion, QueueFullError, Request, TokenEvent
from lckv.generation.sampling import SamplingParams


def answers(
    engine: Engine,
    prompts: Iterable[tuple[list[int], SamplingParams]],
    on_token: Callable[[TokenEvent], None] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[Completion | ValueError]:
    """Answers in the order of the prompts, as soon as they are there; for a prompt that the engine refuses,
    why.

    Prompts are taken while the engine has room for them. `on_step` is called after every step of the engine.
    """
    waiting: deque[Request | ValueError] = deque()
    coming = iter(prompts)
    following = next(coming, None)
    while waiting or following is not None:
        while following is not None:
            try:
                waiting.append(engine.submit(*following, on_token=on_token))
            except QueueFullError:
                break
            except ValueError as error:
                waiting.append(error)
            following = next(coming, None)
        if engine.has_work:
            engine.step()
            on_step()
        while waiting:
            first = waiting[0]
            if isinstance(first, Request) and not first.finished:
                break
            waiting.popleft()
            yield first.result() if isinstance(first, Request) else first
