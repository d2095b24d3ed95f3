"""Malicious files: each is refused by name, in little time and memory, and nothing is run."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lckv_megatron.faults import payloads, readers
from lckv_megatron.faults.children import in_child
from lckv_megatron.faults.damage import Step
from lckv_megatron.faults.materials import Materials
from lckv_megatron.faults.readers import Reader
from lckv_megatron.faults.tables_of_contents import tables_of_contents
from lckv_megatron.faults.tally import Tally, Verdict
from megatron_ext.checkpointing.manifest import (
    MANIFEST_NAME,
    hash_files,
    list_files,
    read_manifest,
    write_manifest,
)

_SECONDS = 30.0
_MEMORY = 2**30


@dataclass(frozen=True)
class Attack:
    """A copy of `folder` is changed by `prepare`, and `read`."""

    kind: str
    what: str
    folder: Path
    prepare: Callable[[Path], object]
    read: Reader
    is_valid: bool = False
    """Whether the result may also be a good one: some replacements are valid files."""


def malice(made: Materials, work: Path, share: float, seed: int, step: Step) -> Iterator[Tally]:
    """Tries a random `share` of all attacks, at least one of each kind."""
    canary = work / "canary"
    by_kind: dict[str, list[Attack]] = {}
    for attack in attacks(made, canary):
        by_kind.setdefault(attack.kind, []).append(attack)
    for kind, known in by_kind.items():
        tally = Tally(f"malice: {kind}")
        chosen = random.Random(f"{seed} {kind}").sample(known, max(1, round(share * len(known))))
        for attack in chosen:
            attempt(attack, work, canary, tally)
            step(1)
        yield tally


def count(made: Materials, share: float) -> int:
    """How many attacks `malice` will try."""
    kinds = [attack.kind for attack in attacks(made, Path("canary"))]
    return sum(max(1, round(share * kinds.count(kind))) for kind in set(kinds))


def attempt(attack: Attack, work: Path, canary: Path, tally: Tally) -> None:
    """Tries one attack in a copy below `work`; code that it runs makes the folder `canary`."""
    copy = work / "copy"
    shutil.copytree(attack.folder, copy, symlinks=True)
    attack.prepare(copy)
    ending = in_child(lambda: attack.read(copy), seconds=_SECONDS, more_bytes=_MEMORY)
    if canary.exists():
        canary.rmdir()
        tally.add(Verdict.WRONG, attack.what, "its code was run")
    elif ending.how == "refused":
        tally.add(Verdict.NOTICED, attack.what, ending.text)
    elif ending.how == "value" and attack.is_valid:
        tally.add(Verdict.OTHER, attack.what, ending.text)
    else:
        said = "it was taken for good" if ending.how == "value" else f"{ending.how}: {ending.text}"
        tally.add(Verdict.WRONG, attack.what, said)
    shutil.rmtree(copy)


def attacks(made: Materials, canary: Path) -> Iterator[Attack]:
    """All of them."""
    yield from _pickles(made, canary)
    yield from _odd_files(made, canary)
    for what, prepare in tables_of_contents().items():
        yield Attack("tables of contents", what, made.checkpoints, _signing(prepare), readers.checkpoint)
    for what, content in payloads.safetensors_headers().items():
        yield Attack(
            "safetensors", what, made.huggingface, _writing(_first_shard(made), content), readers.huggingface
        )
    for name in ("../outside", "/etc/hostname", "..", "a/b", "\0"):
        text = f'{{"weight_map": {{"lm_head.weight": "{name if name != chr(0) else "a"}"}}}}'.encode()
        yield Attack(
            "safetensors", f"an index that names {name!r}", made.huggingface,
            _writing("model.safetensors.index.json", text), readers.huggingface,
        )  # fmt: skip
    for what, content in payloads.indices().items():
        yield Attack("datasets", what, made.dataset, _writing("corpus.idx", content), readers.dataset)
    for what, content in payloads.yaml_files().items():
        yield Attack("settings", what, made.texts, _writing("run.yaml", content), readers.run_file)
    for what, (name, content) in payloads.corpora().items():
        yield Attack("corpora", what, made.texts, _replacing_corpus(name, content), readers.corpus)


def _pickles(made: Materials, canary: Path) -> Iterator[Attack]:
    for what, content in payloads.pickles(canary).items():
        archive = payloads.torch_file(content)
        for name, written in ((".metadata", content), ("common.pt", archive), ("__0_0.distcp", archive)):
            yield Attack(
                "pickles", f"{name}: {what}", made.checkpoints, _signing(_writing(name, written)),
                readers.checkpoint,
            )  # fmt: skip
        yield Attack(
            "pickles", f"pytorch_model.bin: {what}", made.pickled, _writing("pytorch_model.bin", archive),
            readers.pickled,
        )  # fmt: skip
        name = "mp_rank_00/model_optim_rng.pt"
        yield Attack("pickles", f"{name}: {what}", made.legacy, _writing(name, archive), readers.legacy)
    for what, content in (("calls posix.mkdir", payloads.pickles(canary)["calls posix.mkdir"]),):
        signed = _signing(_writing("common.pt", payloads.torch_file(content)))
        yield Attack("pickles", f"a training's common.pt: {what}", made.checkpoints, signed, readers.resumed)
    bomb = payloads.zip_bomb()
    name = "mp_rank_00/model_optim_rng.pt"
    yield Attack("pickles", "a zip bomb", made.legacy, _writing(name, bomb), readers.legacy)


def _odd_files(made: Materials, canary: Path) -> Iterator[Attack]:
    folders: tuple[tuple[str, Path, Reader, str], ...] = (
        ("checkpoint", made.checkpoints / "iter_0000002", readers.checkpoint, "config.json"),
        ("Hugging Face folder", made.huggingface, readers.huggingface, ""),
        ("tokenizer", made.huggingface, readers.tokenizer, "tokenizer"),
        ("dataset", made.dataset, readers.dataset, ""),
        ("older layout", made.legacy, readers.legacy, ""),
    )
    for where, folder, read, only in folders:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for name in names:
            if where == "tokenizer" and not name.startswith(only):
                continue
            for what, make in payloads.odd_files(canary).items():
                yield Attack(
                    f"odd files: {where}", f"{name} is {what}", folder, _replacing(name, make), read,
                    is_valid=where != "checkpoint" and name != "config.json",
                )  # fmt: skip


def _first_shard(made: Materials) -> str:
    return min(path.name for path in made.huggingface.glob("*.safetensors"))


def _writing(name: str, content: bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = next(iter(sorted(folder.glob(f"iter_*/{name}"), reverse=True)), folder / name)
        path.unlink()
        path.write_bytes(content)

    return write


def _replacing(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replace


def _replacing_corpus(name: str, content: bytes) -> Callable[[Path], object]:
    def replace(folder: Path) -> None:
        (folder / "corpus.jsonl").unlink()
        (folder / name).write_bytes(content)

    return replace


def _signing(prepare: Callable[[Path], object]) -> Callable[[Path], object]:
    """With the manifest that a stranger would write, and without an older checkpoint to fall back to."""

    def sign(folder: Path) -> None:
        newest = max(folder.glob("iter_*"))
        for other in folder.glob("iter_*"):
            if other != newest:
                shutil.rmtree(other)
        manifest = read_manifest(newest)
        prepare(folder)
        (newest / MANIFEST_NAME).unlink()
        files = hash_files(newest, list_files(newest))
        write_manifest(newest, type(manifest)(manifest.iteration, manifest.sequence, manifest.layout, files))

    return sign
