"""What a stage sends to others and receives from them, in the order of one list that all stages have, so that
no two wait for each other. Sends and receives are started early and waited for late."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.schedule.ticks import Message, Tick, Work

_Key = tuple[Work, int, int]
"""Work that a message is for: what, which micro-batch, which visit."""


class Mail:
    """What this stage sends and receives, in the order of one list for all stages."""

    def __init__(
        self, messages: Sequence[Message], stage: int, new_message: Callable[[Message], Tensor]
    ) -> None:
        """`new_message` makes room for what is received."""
        group = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = dist.get_process_group_ranks(group)
        self._group, self._stage, self._new_message = group, stage, new_message
        mine = [
            (number, message)
            for number, message in enumerate(messages)
            if stage in (message.source, message.target)
        ]
        self._open = deque((time, list(run)) for time, run in groupby(mine, lambda item: item[1].time))
        self._given: dict[_Key, Tensor] = {}
        self._taken: dict[_Key, tuple[Tensor, list[dist.Work]]] = {}
        self._sent: deque[tuple[Tensor, dist.Work]] = deque()

    def exchange(self, time: float) -> None:
        """Start all that is due until `time`."""
        while self._open and self._open[0][0] <= time:
            self._start(self._open.popleft()[1])

    def _start(self, numbered: list[tuple[int, Message]]) -> None:
        """What is due at the same time starts together."""
        operations, tensors = [], []
        for number, message in numbered:
            key = (message.work, message.micro_batch, message.visit)
            sends = message.source == self._stage
            tensor = self._given.pop(key) if sends else self._new_message(message)
            other = self._ranks[message.target if sends else message.source]
            operations.append(
                dist.P2POp(dist.isend if sends else dist.irecv, tensor, other, self._group, tag=number)
            )
            tensors.append((key, sends, tensor))
        works = dist.batch_isend_irecv(operations)
        for place, (key, sends, tensor) in enumerate(tensors):
            # where the backend joins the operations, one handle stands for all
            own = works if len(works) != len(tensors) else [works[place]]
            if sends:
                self._sent.extend((tensor, work) for work in own)
            else:
                self._taken[key] = (tensor, own)
        while self._sent and self._sent[0][1].is_completed():
            self._sent.popleft()

    def give(self, tick: Tick, tensor: Tensor) -> None:
        """What `tick` has made for the visit that follows."""
        visit = tick.visit + (-1 if tick.work is Work.BACKWARD else 1)
        self._given[tick.work, tick.micro_batch, visit] = tensor.contiguous()

    def take(self, tick: Tick) -> Tensor:
        """What came for `tick`."""
        key = (tick.work, tick.micro_batch, tick.visit)
        if key in self._given:  # the visit before was to this stage too
            return self._given.pop(key)
        tensor, works = self._taken.pop(key)
        for work in works:
            work.wait()
        return tensor

    def wait(self) -> None:
        """Until all that was sent has left."""
        while self._sent:
            self._sent.popleft()[1].wait()
