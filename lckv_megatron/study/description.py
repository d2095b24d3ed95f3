"""What a study asks, from its YAML file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_ext.errors import ConfigError
from megatron_ext.settings import read
from megatron_ext.text_yaml import read_text_yaml

Tree = Mapping[str, Any]
"""Settings of a run as nested mappings, scalars as texts."""

_SHARE_TOLERANCE = 1e-3
_OF_MODEL = ("settings", "stages", "checkpoints", "export")
_OF_STAGE = ("share", "settings")


@dataclass(frozen=True)
class Budget:
    """How long each model is trained."""

    equal: Literal["flops", "tokens"] = "flops"
    """What all models get the same of: operations by the cost model, or tokens."""

    iterations: int = 0
    """Of budget.model, which all others get as much as."""

    model: str = ""
    """A name in models; the speed of the others is also compared with its."""


@dataclass(frozen=True)
class Measurement:
    """What each trained model is measured on."""

    text: tuple[str, ...] = ()
    """Held-out files: texts, JSON lines, folders, globs."""

    json_key: str = "text"
    """Of the text in a line of JSON."""

    max_tokens: int | None = None
    """The loss is that of the first so many tokens. Default: all."""

    context: int | None = None
    """Tokens of a window of the loss, and of a sequence in the cache. Default: one less than the models
    take."""

    stride: int | None = None
    """New tokens of further windows. Default: measure.context."""

    prefill_chunk: int | None = None
    """Tokens of a prompt that are read at once. Default: the engine's."""

    sequences: int = 8
    """Of measure.context tokens, whose keys and values of budget.model make the memory that batches of all
    models get."""

    repeats: int = 5
    """Rounds in which speed is measured, the models in turns."""

    clock: Literal["wall", "cpu"] = "wall"
    """Of speed; cpu: seconds in which the process computed, of use where other programs run meanwhile."""


@dataclass(frozen=True)
class Stage:
    """A part of a model's training; it begins with the weights that the one before has left."""

    share: float
    """Of the model's budget."""

    settings: Tree
    """Over those of the study and of the model."""


@dataclass(frozen=True)
class Entry:
    """A model of the study: a row of the table for each seed."""

    name: str
    settings: Tree
    """Over those of the study."""

    stages: tuple[Stage, ...]
    checkpoints: tuple[Path, ...]
    """Of models that were trained elsewhere, instead of stages; one counts as one seed."""

    export: str | None
    """The sharing map that it is converted with, where it was trained with a family of maps."""


@dataclass(frozen=True)
class _Top:
    """What stands in the file beside `extends`, `settings` and `models`."""

    base: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ("1",)
    budget: Budget = field(default_factory=Budget)
    measure: Measurement = field(default_factory=Measurement)


@dataclass(frozen=True)
class Study:
    """A whole study."""

    path: Path
    base: tuple[tuple[str, Tree], ...]
    """Settings that all runs share, the later ones winning, each with the file that they are from."""

    seeds: tuple[int, ...]
    budget: Budget
    measure: Measurement
    models: tuple[Entry, ...]

    def entry(self, name: str) -> Entry:
        """The model of that name."""
        return next(entry for entry in self.models if entry.name == name)


def read_study(path: Path) -> Study:
    """The study in a file. Raises ConfigError, which names all that is wrong with it.

    Files named in `base` and `extends` are beside it. What a file says wins over the file that it extends:
    each setting of `settings`, `budget` and `measure`, and whole models by their names.
    """
    trees = [*_with_extended(path, ())]
    tops: list[tuple[str, Tree]] = []
    settings: list[tuple[str, Tree]] = []
    models: dict[str, Any] = {}
    for origin, tree in trees:
        rest = dict(tree)
        own, own_models = rest.pop("settings", None), rest.pop("models", None)
        rest.pop("extends", None)
        tops.append((f"{origin}: ", rest))
        settings.append((f"{origin}: settings: ", _mapping(own, f"{origin}: settings")))
        models |= _mapping(own_models, f"{origin}: models")
    top = read(_Top, tops)
    base = [_base(origin.parent, name) for origin, tree in trees for name in _texts(tree, "base")]
    problems: list[str] = []
    entries = [*_entries(models, path.parent, problems)]
    problems += _problems(top, entries)
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    seeds = tuple(int(seed) for seed in top.seeds)
    return Study(path, (*base, *settings), seeds, top.budget, top.measure, tuple(entries))


def _with_extended(path: Path, inside: tuple[Path, ...]) -> Iterator[tuple[Path, Tree]]:
    """The file's content behind that of the file which it extends."""
    if path.resolve() in inside:
        raise ConfigError(f"{path} extends itself, through {', '.join(map(str, inside))}.")
    tree = _mapping(read_text_yaml(path, str(path)), str(path))
    extended = tree.get("extends")
    if extended is not None:
        yield from _with_extended(path.parent / str(extended), (*inside, path.resolve()))
    yield path, tree


def _base(folder: Path, name: str) -> tuple[str, Tree]:
    path = folder / name
    return f"{path}: ", _mapping(read_text_yaml(path, str(path)), str(path))


def _texts(tree: Tree, key: str) -> Sequence[str]:
    value = tree.get(key) or ()
    return [value] if isinstance(value, str) else value


def _mapping(value: object, place: str) -> Tree:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place} is {value!r}; it must be a mapping of names to values.")
    return value


def _entries(models: Tree, folder: Path, problems: list[str]) -> Iterator[Entry]:
    for name, value in models.items():
        try:
            yield _entry(name, _mapping(value, f"models: {name}"), folder)
        except ConfigError as error:
            problems.append(str(error))


def _entry(name: str, tree: Tree, folder: Path) -> Entry:
    place = f"models: {name}"
    if not name or not name.isprintable():
        raise ConfigError(f"models has the name {name!r}; give a model a name in one line.")
    _refuse_others(tree, _OF_MODEL, place)
    settings = _mapping(tree.get("settings"), f"{place}: settings")
    checkpoints = tuple(folder / text for text in _checkpoints(tree, place))
    if checkpoints and (settings or "stages" in tree):
        raise ConfigError(
            f"{place} has checkpoints beside settings or stages; a model that is there says all of itself."
        )
    export = tree.get("export")
    if not (export is None or isinstance(export, str)):
        raise ConfigError(f"{place}: export is {export!r}; it must be a sharing map.")
    given = tree.get("stages", [{}])
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{place}: stages is {given!r}; it must be a list of mappings.")
    stages = tuple(
        _stage(_mapping(stage, f"{place}: stage {number}"), f"{place}: stage {number}", alone=len(given) == 1)
        for number, stage in enumerate(given, start=1)
    )
    total = sum(stage.share for stage in stages)
    if abs(total - 1) > _SHARE_TOLERANCE:
        raise ConfigError(f"{place}: the shares of its stages add up to {total:g}; they must be 1 together.")
    return Entry(name, settings, stages, checkpoints, export)


def _checkpoints(tree: Tree, place: str) -> Sequence[str]:
    """Folders; none where the model is trained here."""
    if "checkpoints" not in tree:
        return ()
    value = tree["checkpoints"]
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts)):
        raise ConfigError(f"{place}: checkpoints is {value!r}; it must be a list of folders.")
    return texts


def _stage(tree: Tree, place: str, *, alone: bool) -> Stage:
    _refuse_others(tree, _OF_STAGE, place)
    text = tree.get("share", "1" if alone else None)
    try:
        share = float(text or 0)
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{place}: share is {text!r}; it must be a number above 0, at most 1.")
    return Stage(share, _mapping(tree.get("settings"), f"{place}: settings"))


def _refuse_others(tree: Tree, known: Sequence[str], place: str) -> None:
    if others := [key for key in tree if key not in known]:
        raise ConfigError(
            f"{place} has {', '.join(others)}; it takes {', '.join(known)}, and settings of a run stand in "
            "settings."
        )


def _problems(top: _Top, entries: Sequence[Entry]) -> Iterator[str]:
    names = [entry.name for entry in entries if not entry.checkpoints]
    if top.budget.model not in names:
        yield (
            f"budget.model is {top.budget.model!r}; it must be one of the models that are trained here: "
            f"{', '.join(names) or 'there are none'}."
        )
    if top.budget.iterations < 1:
        yield f"budget.iterations is {top.budget.iterations}; it must be at least 1."
    if not top.measure.text:
        yield "measure.text is not given; name held-out files."
    wrong = [seed for seed in top.seeds if not seed.isdecimal()]
    if wrong or len({*top.seeds}) < len(top.seeds) or not top.seeds:
        yield f"seeds is {[*top.seeds]}; it must be a list of different whole numbers."
    for entry in entries:
        if len(entry.checkpoints) > len(top.seeds):
            yield (
                f"models: {entry.name}: checkpoints has {len(entry.checkpoints)} folders, one for each seed, "
                f"and seeds has {len(top.seeds)}: give as many seeds, or leave some folders out."
            )
    for name in ("sequences", "repeats", "max_tokens", "context", "stride", "prefill_chunk"):
        value = getattr(top.measure, name)
        if value is not None and value < 1:
            yield f"measure.{name} is {value}; it must be at least 1."
