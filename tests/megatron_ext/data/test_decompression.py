import gzip
import io
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.decompression import compression_of, decompressed
from megatron_ext.errors import ConfigError

PASSED_OVER = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
BLOCK = 128 * 1024


def run_length_frame(blocks: int) -> bytes:
    """A frame of so many blocks, each of four bytes that stand for 128 KiB."""
    heads = (((BLOCK << 3) | 2 | (block == blocks - 1)).to_bytes(3, "little") for block in range(blocks))
    return b"\x28\xb5\x2f\xfd\x00\x38" + b"".join(head + b"x" for head in heads)


def read(data: bytes, count: int = -1) -> bytes:
    compression = compression_of("f", data[:4])
    assert compression
    return decompressed("f", io.BytesIO(data), compression).read(count)


texts = st.one_of(
    st.binary(max_size=300), st.builds(lambda a, n: a * n, st.binary(max_size=9), st.integers(0, 60_000))
)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(texts, st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=4), st.data()
)
def test_whatever_frames_a_file_has(parts: list[tuple[bytes, bool, bool, bool]], data: st.DataObject) -> None:
    """With and without checksum, size and window; whole, and cut short anywhere."""
    packed, content = b"", b""
    for text, checksum, known, streamed in parts:
        pack = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=known)
        if streamed:
            stream = pack.compressobj()
            flushed = stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
            packed += stream.compress(text[:50]) + flushed + stream.compress(text[50:]) + stream.flush()
        else:
            packed += pack.compress(text)
        packed += PASSED_OVER if checksum else b""
        content += text
    assert read(packed) == content
    cut = data.draw(st.integers(4, len(packed) - 1))
    try:
        begins, refusal = content.startswith(read(packed[:cut])), ""  # between two frames
    except ConfigError as error:
        begins, refusal = False, str(error)
    assert begins or "f: truncated or damaged (" in refusal


@pytest.mark.parametrize("level", [1, 3, 19])
def test_large_frames(level: int) -> None:
    content = bytes(range(256)) * 3000 + zlib.compress(bytes(1 << 22)) * 500
    assert read(zstandard.compress(content, level)) == content


@pytest.mark.parametrize(
    "bomb",
    [run_length_frame(50_000), run_length_frame(1) * 50_000, gzip.compress(bytes(1 << 28))],
    ids=["zstd", "zstd frames", "gzip"],
)
def test_a_bomb_needs_no_more_memory_than_any_file(bomb: bytes) -> None:
    """6.5 GB in 200 kB."""
    stream = decompressed("f", io.BytesIO(bomb), compression_of("f", bomb[:4]))
    tracemalloc.start()
    try:
        for _ in range(64):
            assert len(stream.read(1 << 20)) == 1 << 20
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"\x28\xb5\x2f\xfd",
        b"\x28\xb5\x2f\xfd\x00",
        b"\x28\xb5\x2f\xfd\x00\x38\x07\x00\x00" + b"x" * 100,  # a block of a kind that there is not
        b"\x28\xb5\x2f\xfd\xff" + b"\xff" * 100,
        zstandard.compress(b"abc") + b"more",
        zstandard.compress(b"abc") + b"mo",
        PASSED_OVER[:-1],
        b"\x28\xb5\x2f\xfd\x00\x38" + (((1 << 20) << 3) | 3).to_bytes(3, "little") + b"x",  # a run of 1 MiB
    ],
)
def test_what_is_no_frame(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^f: truncated or damaged \("):
        read(data)
