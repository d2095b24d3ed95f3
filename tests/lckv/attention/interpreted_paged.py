"""The Triton kernel against the PyTorch twin, on CPU through Triton's interpreter.

Not collected by name: Triton decides when it is imported whether it interprets, so `test_paged_kernel.py`
runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch

from lckv.attention.kernels import paged
from lckv.attention.kernels.paged import attend_paged
from lckv.attention.paged import attend_in_torch
from tests.lckv.attention.paged_slots import Slots


@pytest.mark.parametrize(
    ("lengths", "page_size", "group", "channels", "window", "dtype"),
    [
        ([[0, 1], [70, 16]], 16, 1, 8, False, torch.float32),
        ([[200, 65, 3]], 4, 4, 8, False, torch.float32),
        ([[64, 0], [0, 129]], 1, 2, 6, True, torch.float32),
        ([[0, 0]], 16, 2, 8, False, torch.float32),
        ([[300, 10]], 256, 3, 16, True, torch.float32),
        ([[130, 64]], 24, 2, 24, True, torch.float16),  # its matrix product does not know bfloat16
    ],
)
def test_equals_the_twin(lengths, page_size, group, channels, window, dtype):
    gap = page_size in (4, 24)
    slots = Slots(torch.tensor(lengths), page_size, group, channels, window=window, gap=gap, dtype=dtype)
    found, expected = (slots.attend(function) for function in (attend_paged, attend_in_torch))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(found.output, expected.output, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.lse, expected.lse, rtol=tolerance, atol=tolerance)
    assert found.output.dtype == found.lse.dtype == torch.float32


def test_a_list_with_room_for_more(monkeypatch):
    """The kernel stops where the number on the device says, whatever stands behind it; and there are fewer
    programs than chunks."""
    slots = Slots(torch.tensor([[200, 65], [0, 300]]), 16, 2, 8)
    expected = slots.attend(attend_paged)
    slots.work = slots.padded(32).work
    slots.work.head[-4:] = 10**6
    monkeypatch.setattr(paged, "_MOST_PROGRAMS", 3)
    for one, other in zip(slots.attend(attend_paged), expected, strict=True):
        assert torch.equal(one, other)
