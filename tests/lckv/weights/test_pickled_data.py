"""Pickles are read as data: what they say is done to nothing, and their size bounds the work."""

import argparse
import collections
import io
import os
import pickle
import struct
import time
import tracemalloc
from typing import Any

import pytest

from lckv.weights.pickled_data import ForbiddenNameError, Made, Name, Persistent, read_pickle

NAMES = ("argparse.Namespace", "builtins.bytearray", "torch.Size", "torch.float32")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2, 2**40, 2.5, None, True, False], "b": ("x", ("y",), ()), "ü" * 300: {}},
        list(range(3000)),
        {index: str(index) for index in range(3000)},
        collections.OrderedDict(a=1, b=collections.OrderedDict()),
    ],
)
def test_plain_data_are_themselves(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), ()) == value


def test_objects_stay_notes() -> None:
    made = read_pickle(pickle.dumps({"args": argparse.Namespace(a=1, b=[2])}, 2), NAMES)["args"]
    assert isinstance(made, Made)
    assert (made.name, made.arguments, made.state) == ("argparse.Namespace", (), {"a": 1, "b": [2]})


def test_references_stay_references() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", 3) if value is Ellipsis else None

    file = io.BytesIO()
    Pickler(file, 2).dump([...])
    (read,) = read_pickle(file.getvalue(), ())
    assert isinstance(read, Persistent)
    assert read.reference == ("storage", 3)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_other_names_are_refused(protocol: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForbiddenNameError, match=r"it names posix\.mkdir"):
        read_pickle(pickle.dumps(Evil(), protocol), NAMES)
    assert not (tmp_path / "made").exists()


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def test_the_state_of_a_class_is_not_set() -> None:
    """Python's unpickler would change argparse.Namespace for the whole process."""
    content = name("argparse.Namespace") + b"N}" + text("__init__") + b"Ns\x86b."
    assert pickle.loads(b"\x80\x02" + name("argparse.Namespace") + b".") is argparse.Namespace
    with pytest.raises(pickle.UnpicklingError, match="gives a state to what has none"):
        read_pickle(content, NAMES)
    assert argparse.Namespace(a=1).a == 1


def test_nothing_is_called() -> None:
    """Python's unpickler would take up a terabyte."""
    content = (
        b"\x80\x02" + name("builtins.bytearray") + b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R."
    )
    made = read_pickle(content, NAMES)
    assert isinstance(made, Made)
    assert made.arguments == (10**12,)


def laughs(depth: int) -> bytes:
    """A tuple of two references to a tuple of two references to ..."""
    content = b"\x80\x02)q\x00"
    for level in range(depth):
        content += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return content + b"."


DAMAGED = {
    "written out, larger than any memory": laughs(60),
    "the same as the key of a dictionary": b"\x80\x02}" + laughs(60)[2:-1] + b"Ns.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "too deep": b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
    "a text that is longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a.",
    "an array that is longer than the file": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.",
    "a place in the memo that was never filled": b"\x80\x02j\xff\xff\xff\xff.",
    "a mark too many": b"\x80\x02(((.",
    "a mark too few": b"\x80\x02Ne.",
    "below a mark": b"\x80\x02N(\x85.",
    "an item of no list": b"\x80\x02NNa.",
    "an item of no dictionary": b"\x80\x02NNNs.",
    "a call of no function": b"\x80\x02N)R.",
    "a state of no object": b"\x80\x02NNb.",
    "half": pickle.dumps(list(range(100)))[:50],
    "nothing": b"",
    "only an end": b".",
    "a number of many digits": b"L" + b"9" * 10**5 + b"L\n.",
    "names of numbers": b"\x80\x04K\x01K\x02\x93.",
    "an instruction of no use": b"\x80\x02N2.",
    "no instruction": b"\x80\x02\xff.",
    "a text that is none": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_one_error_in_little_time_and_memory(content: bytes) -> None:
    started = time.monotonic()
    tracemalloc.start()
    with pytest.raises(pickle.UnpicklingError):
        read_pickle(content, NAMES)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert time.monotonic() - started < 5


def test_a_name_is_no_value() -> None:
    read = read_pickle(b"\x80\x02" + name("torch.float32") + b".", NAMES)
    assert isinstance(read, Name)
    assert read.name == "torch.float32"


def test_every_flipped_bit_is_an_error_or_data() -> None:
    whole = pickle.dumps({"args": argparse.Namespace(a=1, b=[2, "x"]), "n": [1.5, (1, 2, 3, 4)]}, 4)
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            try:
                read_pickle(bytes(damaged), NAMES)
            except pickle.UnpicklingError:
                continue
