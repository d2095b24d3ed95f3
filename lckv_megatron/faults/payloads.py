"""What malicious files hold."""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEEP = b"[" * 200_000
HUGE_BYTES = 2**40
"""Of a file with a hole, which takes no space."""


class Runs:
    """Makes a folder when it is unpickled in the usual way."""

    def __init__(self, canary: Path) -> None:
        self._canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._canary,)


def _name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def pickles(canary: Path) -> dict[str, bytes]:
    """Pickles by what they try."""
    command = f"import os; os.mkdir({str(canary)!r})"
    calls = {
        "posix.mkdir": str(canary),
        "builtins.exec": command,
        "builtins.eval": f"__import__('os').mkdir({str(canary)!r})",
        "os.system": f"mkdir {canary}",
        "subprocess.getoutput": f"mkdir {canary}",
        "torch.hub.load": str(canary),
        "torch.load": str(canary),
        "builtins.__import__": "antigravity",
        "pickle.loads": "x",
        "runpy.run_path": str(canary),
        "torch.serialization.load": str(canary),
        "pathlib.Path.mkdir": str(canary),
    }
    made = {
        f"calls {name}": b"\x80\x02" + _name(name) + _text(argument) + b"\x85R."
        for name, argument in calls.items()
    }
    made |= {
        f"calls {name} by its stack": b"\x80\x04" + _from_stack(name) + _text(argument) + b"\x85R."
        for name, argument in calls.items()
    }
    large = b"\x8a\x06" + (10**12).to_bytes(6, "little")
    made |= {
        "a large array": b"\x80\x02" + _name("builtins.bytearray") + large + b"\x85R.",
        "a large storage": b"\x80\x02" + _name("torch.storage.UntypedStorage") + large + b"\x85R.",
        "a large tensor": b"\x80\x02" + _name("torch.FloatTensor") + large + b"\x85R.",
        "a new state of a class": b"\x80\x02"
        + _name("torch.distributed.checkpoint.metadata.Metadata")
        + b"N}" + _text("__init__") + b"Ns\x86b.",
        "a new state of a function": b"\x80\x02" + _name("torch._utils._rebuild_tensor_v2")
        + b"N}" + _text("__code__") + b"Ns\x86b.",
        "references that grow": _laughs(60),
        "a key that grows": b"\x80\x02}" + _laughs(60)[2:-1] + b"Ns.",
        "lists in lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "itself": b"\x80\x02]q\x00h\x00a.",
        "a long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**50) + b"a.",
        "a long array": b"\x80\x05\x96" + struct.pack("<Q", 2**38) + b"a.",
        "a large memo": b"\x80\x02Nr\xff\xff\xff\xff.",
        "an old number": b"I" + b"9" * 200_000 + b"\n.",
        "an object of copyreg": pickle.dumps(Runs(canary), 0),
        "not a pickle": b"\x00" * 100,
        "nothing": b"",
    }  # fmt: skip
    return made


def _from_stack(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)) + b"\x93"


def _laughs(depth: int) -> bytes:
    content = b"\x80\x02)q\x00"
    for level in range(depth):
        content += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return content + b"."


def torch_file(pickled: bytes) -> bytes:
    """An archive of torch.save with another pickle in it."""
    file = io.BytesIO()
    torch.save(torch.zeros(4), file)
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, pickled if name.endswith("/data.pkl") else content)
    return made.getvalue()


def zip_bomb() -> bytes:
    """An archive of torch.save whose numbers are compressed."""
    file = io.BytesIO()
    torch.save(torch.zeros(4), file)
    made = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, bytes(2**26) if "/data/" in name else archive.read(name))
    return made.getvalue()


def safetensors_headers() -> dict[str, bytes]:
    """Files of safetensors by what is wrong with their header."""

    def file(header: bytes, data: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> bytes:
        return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()

    two = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}
    return {
        "a long header": struct.pack("<Q", 2**62) + b"{}",
        "a header of the file's length": struct.pack("<Q", 10) + b"{}",
        "a deep header": file(DEEP),
        "a deep value": file(b'{"w":' + DEEP + b"}"),
        "no object": file(b"[]"),
        "an empty object": file(b"{}"),
        "a large tensor": file(entry([2**40], [0, 2**42])),
        "a product that overflows": file(entry([2**40, 2**40], [0, 4]), b"0000"),
        "negative places": file(entry([1], [-4, 0]), b"0000"),
        "places behind the end": file(entry([1], [4, 8]), b"0000"),
        "tensors that overlap": file(json.dumps(two).encode(), b"0000"),
        "no dtype": file(entry([1], [0, 4], "X9"), b"0000"),
        "a text as a shape": file(entry("1", [0, 4]), b"0000"),
        "no places": file(b'{"w":{"dtype":"F32","shape":[1]}}', b"0000"),
        "a pickle": torch_file(pickle.dumps({})),
        "garbage": bytes(range(256)) * 20,
    }


def _make_hole(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE_BYTES)


def odd_files(canary: Path) -> dict[str, Callable[[Path], object]]:
    """What any file can be replaced by; each makes it at a path where nothing is."""
    return {
        "a FIFO": os.mkfifo,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a folder": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a hole of a terabyte": _make_hole,
        "deep JSON": lambda path: path.write_bytes(DEEP),
        "deep objects": lambda path: path.write_bytes(b'{"a":' * 200_000),
        "JSON of another kind": lambda path: path.write_bytes(b"[3]"),
        "a long number": lambda path: path.write_bytes(b'{"a": ' + b"9" * 100_000 + b"}"),
        "an empty object": lambda path: path.write_bytes(b"{}"),
        "nothing": lambda path: path.write_bytes(b""),
        "zeros": lambda path: path.write_bytes(bytes(5000)),
        "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
        "a pickle": lambda path: path.write_bytes(pickle.dumps(Runs(canary))),
        "a zip bomb": lambda path: path.write_bytes(zip_bomb()),
    }


def yaml_files() -> dict[str, bytes]:
    """Runs' settings by what they try."""
    doubling = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    doubling += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    return {
        "aliases that grow": "\n".join(doubling).encode(),
        "merges that grow": b"a: &a {<<: *a}",
        "an object": b"!!python/object/apply:os.mkdir [canary]",
        "another object": b"model: !!python/name:os.system",
        "deep lists": b"[" * 50_000,
        "deep blocks": b"".join(b" " * n + b"a:\n" for n in range(3000)),
        "a long number": b"train: {train_iters: " + b"9" * 100_000 + b"}",
        "zeros": bytes(1000),
        "no UTF-8": b"\xff\xfe\xff",
        "a list": b"- 1\n- 2",
    }


def corpora() -> dict[str, tuple[str, bytes]]:
    """Input files by what they try: name and content."""
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    part = gzip.compress(bytes(2**20)) * 4096
    return {
        "a deep record": ("corpus.jsonl", deep),
        "one record of gigabytes, compressed": ("corpus.jsonl.gz", part),
        "half a compressed file": ("corpus.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 1000)[:50]),
        "no compressed file": ("corpus.jsonl.gz", b"x" * 1000),
        "no zstandard file": ("corpus.jsonl.zst", b"x" * 1000),
        "no UTF-8": ("corpus.jsonl", b'{"text": "\xff\xfe"}\n'),
        "half a record": ("corpus.jsonl", b'{"text": "abc'),
        "a lone surrogate": ("corpus.jsonl", b'{"text": "\\ud800"}\n'),
        "a number as text": ("corpus.jsonl", b'{"text": 3}\n'),
        "no Parquet file": ("corpus.parquet", b"PAR1" + b"x" * 100 + b"PAR1"),
    }


def indices() -> dict[str, bytes]:
    """Indices of datasets by what is wrong with them."""
    magic = b"MMIDIDX\x00\x00"

    def index(code: int = 8, sequences: int = 2, documents: int = 3, body: bytes = b"") -> bytes:
        return struct.pack("<9sQBQQ", magic, 1, code, sequences, documents) + body

    lengths, places, ends = ([10, 10], [0, 20], [0, 1, 2])

    def whole(lengths: Any = lengths, places: Any = places, ends: Any = ends) -> bytes:
        body = struct.pack(f"<{len(lengths)}i{len(places)}q{len(ends)}q", *lengths, *places, *ends)
        return index(sequences=len(lengths), documents=len(ends), body=body)

    return {
        "a huge count": index(sequences=2**62),
        "a huge count of documents": index(documents=2**62),
        "a count that overflows": index(sequences=2**64 - 1, documents=2**64 - 1),
        "no dtype": index(code=99),
        "negative lengths": whole(lengths=[-10, 10]),
        "long lengths": whole(lengths=[2**31 - 1, 10]),
        "negative places": whole(places=[-20, 20]),
        "far places": whole(places=[0, 2**60]),
        "places that overlap": whole(places=[0, 0]),
        "documents in disorder": whole(ends=[0, 2, 1]),
        "documents behind the end": whole(ends=[0, 1, 2**40]),
        "negative documents": whole(ends=[0, -1, 2]),
        "another version": magic + bytes(100),
        "nothing": b"",
    }
