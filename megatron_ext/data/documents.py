"""Reading the documents of an indexed dataset at random."""

import struct
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ext.data.indexed import HEADER, REMEDY, IndexInfo, read_index
from megatron_ext.data.open_file import OpenFile, OpenFiles

_AGAIN = f"Copy .bin and .idx again, or make them with {REMEDY}."


class DocumentReader:
    """The documents of PREFIX.bin, each a sequence of PREFIX.idx."""

    def __init__(self, prefix: str, files: OpenFiles | None = None) -> None:
        """`files`: with which others it shares descriptors. Raises ConfigError where a file is missing."""
        self._prefix = prefix
        self._index = OpenFile(Path(f"{prefix}.idx"), _AGAIN, files)
        self._tokens = OpenFile(Path(f"{prefix}.bin"), _AGAIN, files)

    @cached_property
    def _info(self) -> IndexInfo:
        """Read when it is needed first. Raises ConfigError as `read_index` does."""
        return read_index(self._prefix)

    def read(self, document: int, offset: int, length: int | None) -> np.ndarray:
        """`length` tokens of a document from token `offset` on, None: all that follow; [length], of the
        dataset's type.

        Raises ConfigError as `read_index` does, and where the files do not hold them, because they are
        damaged or were cut short.
        """
        if not 0 <= document < self._info.sequences:
            raise self._index.damaged(
                f"has {self._info.sequences} documents, but number {document} is asked for: it is not the "
                "index that it was"
            )
        tokens = self._of_index("<i", HEADER.size + 4 * document)
        begin = self._of_index("<q", HEADER.size + 4 * self._info.sequences + 8 * document)
        length = tokens - offset if length is None else length
        if not 0 <= offset <= offset + length <= tokens or begin < 0:
            raise self._index.damaged(
                f"document {document} begins at byte {begin} and has {tokens} tokens, but {length} from "
                f"token {offset} on are asked for: it is not the index that it was"
            )
        size = self._info.dtype.itemsize
        return np.frombuffer(self._tokens.read(begin + offset * size, length * size), self._info.dtype)

    def _of_index(self, kind: str, at: int) -> int:
        return struct.unpack(kind, self._index.read(at, struct.calcsize(kind)))[0]
