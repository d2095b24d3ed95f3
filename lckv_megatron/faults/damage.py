"""Files that have changed: bytes flipped, ends cut off, blocks zeroed."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lckv_megatron.faults import readers
from lckv_megatron.faults.children import Ending, in_child
from lckv_megatron.faults.materials import Materials
from lckv_megatron.faults.readers import FELL_BACK, Reader
from lckv_megatron.faults.tally import Tally, Verdict
from megatron_ext.checkpointing.folders import read_pointer

Step = Callable[[int], object]


@dataclass(frozen=True)
class Target:
    """A folder, how it is read, and which of its files are damaged."""

    name: str
    folder: Path
    read: Reader
    checksums: bool
    """Whether every byte is protected. Where not, a change may be another valid file."""

    files: tuple[str, ...]
    """Relative to the folder."""

    first_bytes: int | None = None
    """Of each file only so many are damaged: behind them are numbers without a checksum."""


def targets(made: Materials) -> list[Target]:
    """All that is damaged."""
    newest = read_pointer(made.checkpoints)
    assert newest is not None
    own = [f"{newest}/{name}" for name in _files(made.checkpoints / newest)]
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    settings = tuple(name for name in _files(made.huggingface) if name.endswith(".json"))
    weights = tuple(name for name in _files(made.huggingface) if name.endswith(".safetensors"))
    return [
        Target("checkpoint", made.checkpoints, readers.checkpoint, True, (*own, "latest")),
        Target("Hugging Face folder", made.huggingface, readers.huggingface, False, settings),
        Target("Hugging Face weights", made.huggingface, readers.huggingface, False, weights, 600),
        Target("tokenizer", made.huggingface, readers.tokenizer, False, tokenizer),
        Target("pickled weights", made.pickled, readers.pickled, False, ("pytorch_model.bin",)),
        Target("older layout", made.legacy, readers.legacy, False, tuple(_files(made.legacy))),
        Target("dataset", made.dataset, readers.dataset, False, tuple(_files(made.dataset))),
    ]


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def damage(made: Materials, work: Path, per_file: int, seed: int, step: Step) -> Iterator[Tally]:
    """Damages each file of each target `per_file` times. `step` is told of each fault."""
    for target in targets(made):
        yield damage_target(target, work, per_file, seed, step)


def damage_target(target: Target, work: Path, per_file: int, seed: int, step: Step) -> Tally:
    """Damages each file of one target `per_file` times, in a copy below `work`."""
    tally = Tally(f"damage: {target.name}")
    good = in_child(lambda: target.read(target.folder))
    if good.how != "value":
        raise RuntimeError(f"{target.name} cannot be read undamaged: {good.text}")
    for name in target.files:
        # Each file by a generator of its own, so that a fault can be repeated alone.
        generator = random.Random(f"{seed} {target.name} {name}")
        for number in range(per_file):
            _damage_one(target, name, generator, number, work, good, tally)
            step(1)
    return tally


def _damage_one(
    target: Target, name: str, generator: random.Random, number: int, work: Path, good: Ending, tally: Tally
) -> None:
    copy = work / "copy"
    shutil.copytree(target.folder, copy, symlinks=True)
    what = change(copy / name, generator, number, target.first_bytes)
    ending = in_child(lambda: target.read(copy))
    tally.add(_verdict(ending, good, target), f"{name} {what}", ending.text)
    shutil.rmtree(copy)


def _verdict(ending: Ending, good: Ending, target: Target) -> Verdict:
    if ending.how == "refused":
        return Verdict.NOTICED if ending.text.strip() else Verdict.WRONG
    if ending.how != "value":
        return Verdict.WRONG
    if ending.text == good.text:
        return Verdict.HARMLESS
    if ending.text.startswith(FELL_BACK):
        return Verdict.NOTICED
    return Verdict.WRONG if target.checksums else Verdict.OTHER


def change(path: Path, generator: random.Random, number: int, first_bytes: int | None) -> str:
    """Damages a file; says how. Three of four times a byte is flipped; else the end is cut off or a block
    zeroed."""
    size = path.stat().st_size
    place = generator.randrange(min(size, first_bytes or size)) if size else 0
    if number % 4 == 3 and generator.random() < 0.5:
        os.truncate(path, place)
        return f"cut off at byte {place}"
    with path.open("r+b") as file:
        file.seek(place)
        if number % 4 == 3:
            count = min(64, (first_bytes or size) - place, size - place)
            file.write(bytes(count))
            return f"{count} bytes zeroed at {place}"
        byte = file.read(1)
        flipped = (byte[0] if byte else 0) ^ (1 << generator.randrange(8))
        file.seek(place)
        file.write(bytes([flipped]))
        return f"byte {place} is {flipped:#04x}"
