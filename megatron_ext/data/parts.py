"""Jobs of several machines: each makes the dataset of a part of the files, and the merged parts are what one
machine would have made.

Parts are whole files that follow one another, of about equal size on disk. Every machine computes the same
parts from the same list of files, so the machines need not know of each other.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.data.sources import Source
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """Which part of a job a dataset is."""

    index: int
    """Number of parts before this one."""

    count: int
    """Parts of the job."""

    files: str
    """Hash of the names and sizes of all files of the job: parts of one job agree in it."""

    def prefix(self, whole: str) -> str:
        """Where the dataset of this part goes: that of the whole job is `whole`."""
        return f"{whole}-{self.index:05d}-of-{self.count:05d}"


def take_part(sources: Sequence[Source], index: int, count: int) -> tuple[Part, list[Source]]:
    """The part `index`, from 0, of `count`, and its files.

    Raises ConfigError where there are fewer files than parts.
    """
    if len(sources) < count:
        raise ConfigError(
            f"--part {index}/{count}: the input has only {len(sources)} file(s), and parts are whole files. "
            f"Give at most {len(sources)} part(s), or cut the input into more files."
        )
    names = json.dumps([(source.path, source.size, source.format) for source in sources])
    files = hashlib.blake2b(names.encode(), digest_size=16).hexdigest()
    ends = _ends([source.size for source in sources], count)
    return Part(index, count, files), list(sources[ends[index] : ends[index + 1]])


def _ends(sizes: Sequence[int], count: int) -> list[int]:
    """Where parts end, a 0 before them: each has a file or more, and ends as near to its share of the bytes
    as whole files allow."""
    total, ends, done = sum(sizes), [0], 0
    for part in range(1, count + 1):
        end = ends[-1] + 1
        done += sizes[end - 1]
        while end < len(sizes) - (count - part) and (2 * done + sizes[end]) * count <= 2 * total * part:
            done += sizes[end]
            end += 1
        ends.append(end if part < count else len(sizes))
    return ends
