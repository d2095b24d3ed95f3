"""A part of a file reads like a file."""

import io
import os

from hypothesis import given
from hypothesis import strategies as st

from lckv.weights.file_part import FilePart


@given(data=st.data())
def test_a_part_of_a_file_is_a_file(data):
    content = bytes(range(100))
    offset = data.draw(st.integers(0, 100))
    length = data.draw(st.integers(0, 100 - offset))
    part, plain = (
        FilePart(io.BytesIO(content), offset, length),
        io.BytesIO(content[offset : offset + length]),
    )
    for _ in range(5):
        whence = data.draw(st.sampled_from([os.SEEK_SET, os.SEEK_END]))
        place = (
            data.draw(st.integers(0, 120)) if whence == os.SEEK_SET else data.draw(st.integers(-length, 20))
        )
        assert part.seek(place, whence) == plain.seek(place, whence)
        count = data.draw(st.integers(0, 60))
        assert part.read(count) == plain.read(count)
        assert part.tell() == plain.tell()
