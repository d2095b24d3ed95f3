"""Slots of heads of any lengths, scattered over the pages of a pool."""

from collections.abc import Callable

import torch
from torch import Tensor

from lckv.attention.pages import (
    PaddedWork,
    Pages,
    PagesAttended,
    Work,
    WorkOnHost,
    list_work,
    pages_of_a_chunk,
)


class Slots:
    """Random keys, values and queries. Every page that is not owned holds values that would show."""

    def __init__(
        self,
        lengths: Tensor,
        page_size: int,
        group: int,
        channels: int,
        *,
        window: bool = False,
        gap: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """`lengths` int64 [b, g]; with a window, each head sees about its last third, and with a gap not the
        one but last slot, or in the first row not the last one."""
        generator = torch.Generator().manual_seed(int(lengths.sum()) + page_size)
        heads = lengths.numel()
        self.first, self.stop, self.scale = (lengths * 2 // 3 if window else None), lengths, channels**-0.5
        self.without = None
        if gap:
            self.without = lengths - 2
            self.without[0] += 1
        chunk = pages_of_a_chunk(page_size, device)
        columns = (int(lengths.max()) // (chunk * page_size) + 1) * chunk
        owned = -(-lengths.flatten() // page_size)
        numbers = (1 + torch.randperm(int(owned.sum()) + 3, generator=generator)).int()
        # Rows of the table are in another order than heads.
        rows = torch.randperm(heads, generator=generator)
        table = torch.zeros(heads, columns, dtype=torch.int32)
        for head, row in enumerate(rows.tolist()):
            begin = int(owned[:head].sum())
            table[row, : owned[head]] = numbers[begin : begin + owned[head]]
        pool = torch.randn(2, len(numbers) + 1, page_size, channels, generator=generator).to(dtype)
        self.query = torch.randn(len(lengths), lengths.shape[1] * group, channels, generator=generator).to(
            device, dtype
        )
        self.pages = Pages(*pool.to(device), table.to(device))
        self.rows, self.lengths = rows, lengths
        first = torch.zeros_like(lengths) if self.first is None else self.first
        self.work: Work = list_work(
            first.flatten().numpy(),
            lengths.flatten().numpy(),
            rows.numpy(),
            page_size=page_size,
            columns=columns,
            device=torch.device(device),
        )

    def padded(self, capacity: int) -> PaddedWork:
        """The work in a list with room for so much."""
        padded = PaddedWork(self.lengths.numel(), capacity, self.query.device)
        padded.fill(WorkOnHost(*(part.cpu().numpy() for part in self.work)))
        return padded

    def attend(self, function: Callable[..., PagesAttended]) -> PagesAttended:
        device = self.query.device
        first, without = (None if part is None else part.to(device) for part in (self.first, self.without))
        stop = self.stop.to(device)
        return function(self.query, self.pages, self.work, first, stop, without, scale=self.scale)

    def by_formula(self) -> PagesAttended:
        """float64, head by head."""
        heads = self.query.double().cpu().reshape(self.lengths.numel(), -1, self.query.shape[-1])
        outputs, lses = torch.zeros_like(heads), torch.full(heads.shape[:2], -torch.inf, dtype=torch.float64)
        for head, (row, length) in enumerate(
            zip(self.rows.tolist(), self.lengths.flatten().tolist(), strict=True)
        ):
            first = 0 if self.first is None else int(self.first.flatten()[head])
            owned = self.pages.table[row].long()
            seen = [*range(first, length)]
            if self.without is not None and (gap := int(self.without.flatten()[head])) in seen:
                seen.remove(gap)
            key, value = (pool[owned].flatten(0, 1)[seen].double().cpu() for pool in self.pages[:2])
            scores = heads[head] @ key.T * self.scale
            outputs[head], lses[head] = scores.softmax(-1) @ value, scores.logsumexp(-1)
        return PagesAttended(outputs.view(self.query.shape), lses.view(self.query.shape[:-1]))
