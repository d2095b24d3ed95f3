"""What is wrong with the data of a run, found out before anything is built or any other rank waits."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config import DataConfig
from megatron_ext.data.blends import split_sources
from megatron_ext.data.description import DatasetManifest, existing_manifest, manifest_path, read_manifest
from megatron_ext.data.index_checks import check_index
from megatron_ext.data.indexed import REMEDY, IndexInfo, outside_vocabulary
from megatron_ext.data.open_file import OpenFile
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

_NEED_EOD = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
_PROBES = 16
_PROBE_TOKENS = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """Size in tokens and end-of-document token of the vocabulary
    that datasets were made with; identity, if known."""

    size: int
    eod: int
    fingerprint: str
    splitting: str
    """How text becomes its tokens; "" if not known."""

    origin: str
    """Where this is known from, for messages."""

    @classmethod
    def of(cls, prefix: str, manifest: DatasetManifest) -> "Vocabulary":
        """That of the tokenizer that made a dataset."""
        return cls(
            manifest.vocab_size,
            manifest.eod,
            manifest.tokenizer_fingerprint,
            manifest.tokenizer_splitting,
            str(existing_manifest(prefix)),
        )

    def differences(self, other: "Vocabulary") -> list[str]:
        """In what they differ, as far as both know."""
        pairs = {
            "fingerprint": (self.fingerprint, other.fingerprint),
            "vocab_size": (self.size, other.size),
            "eod": (self.eod, other.eod),
            "splitting": (self.splitting, other.splitting),
        }
        return [
            f"{name} {ours} instead of {theirs}"
            for name, (ours, theirs) in pairs.items()
            if ours != theirs and "" not in (ours, theirs)
        ]


def find_vocabulary(data: DataConfig) -> Vocabulary | None:
    """The vocabulary of the configured tokenizer; without one that of the datasets, if their
    descriptions agree; else None.

    Raises ConfigError if the tokenizer cannot be loaded or the settings cannot be read.
    """
    if data.tokenizer_type != "none":
        tokenizer = load_tokenizer(data.tokenizer_type, data.tokenizer_model)
        origin = f"data.tokenizer_model={data.tokenizer_model}"
        return Vocabulary(
            tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint, tokenizer.splitting, origin
        )
    if data.mock:
        return None
    vocabularies: list[Vocabulary] = []
    for prefix in _prefixes(data):
        manifest = read_manifest(prefix)
        if manifest is None:
            return None
        vocabularies.append(Vocabulary.of(prefix, manifest))
    agree = not any(vocabulary.differences(vocabularies[0]) for vocabulary in vocabularies)
    return vocabularies[0] if agree and vocabularies else None


def check_data(data: DataConfig, vocab_size: int) -> list[str]:
    """All that is wrong with the settings, files and tokens of the data, a line each; nothing is built.

    `vocab_size` is the model's, without padding. Looked at are: settings that contradict each other or cannot
    be read; missing, truncated or damaged .bin and .idx files; descriptions that disagree with the files,
    with the configured tokenizer or with other datasets; token ids outside the vocabulary (without
    a description a sample of the tokens: the rest is checked as it is read).
    """
    problems: list[str] = []
    if data.mock:
        paths = [
            name
            for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path")
            if getattr(data, name)
        ]
        return [f"data.mock=true and data.{paths[0]} are both given. Give one of them."] if paths else []
    try:
        prefixes = _prefixes(data)
    except ConfigError as error:
        return str(error).split("\n")
    try:
        expected = find_vocabulary(data) or _first_vocabulary(prefixes)
    except ConfigError as error:
        problems.append(str(error))
        expected = None
    for prefix in prefixes:
        try:
            problems += _dataset_problems(prefix, data, vocab_size, expected)
        except ConfigError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def _prefixes(data: DataConfig) -> list[str]:
    sources = [source for source in split_sources(data) if source is not None]
    return list(dict.fromkeys(prefix for source in sources for prefix in source.blend.prefixes))


def _first_vocabulary(prefixes: list[str]) -> Vocabulary | None:
    """What the first dataset that says so was made with: the others have to agree with it."""
    for prefix in prefixes:
        if manifest := read_manifest(prefix):
            return Vocabulary.of(prefix, manifest)
    return None


def _dataset_problems(
    prefix: str, data: DataConfig, vocab_size: int, expected: Vocabulary | None
) -> Iterator[str]:
    info = check_index(prefix)
    if not info.tokens:
        yield f"dataset {prefix} holds no token."
        return
    manifest = read_manifest(prefix)
    if problem := _format_problem(prefix, manifest, data):
        yield problem
        return
    needs_eod = [name for name in _NEED_EOD if getattr(data, name)]
    if manifest is None:
        logger.warning(
            "%s not found: whether the tokenizer is the one that made the dataset is not checked",
            manifest_path(prefix),
        )
        yield from _token_problems(prefix, info, vocab_size, needs_eod[:1], expected)
        return
    if (manifest.dtype, manifest.documents, manifest.tokens) != (
        str(info.dtype),
        info.sequences,
        info.tokens,
    ):
        yield (
            f"{existing_manifest(prefix)} describes {manifest.documents} documents with {manifest.tokens} "
            f"tokens ({manifest.dtype}), but the index has {info.sequences} with {info.tokens} "
            f"({info.dtype}): it belongs to other files. Copy all three again."
        )
    yield from _vocabulary_problems(prefix, manifest, vocab_size, expected)
    if needs_eod and not manifest.append_eod:
        yield _no_eod(needs_eod[0], prefix)


def _format_problem(prefix: str, manifest: DatasetManifest | None, data: DataConfig) -> str | None:
    """Why a dataset is not of `data.format`, if so."""
    if manifest is None and data.format == "chat":
        return (
            f"{manifest_path(prefix)} not found, which says that {prefix} holds conversations, as "
            f"data.format is chat. Copy it too, or make the dataset again with {REMEDY} --data-format chat."
        )
    if manifest is None or manifest.data_format == data.format:
        return None
    kinds = {"chat": "conversations", "pretraining": "texts"}
    return (
        f"dataset {prefix} holds {kinds.get(manifest.data_format, manifest.data_format)}, but data.format is "
        f"{data.format}. Set data.format to {manifest.data_format}, or make the dataset with {REMEDY} "
        f"--data-format {data.format}."
    )


def _vocabulary_problems(
    prefix: str, manifest: DatasetManifest, vocab_size: int, expected: Vocabulary | None
) -> Iterator[str]:
    differing = [] if expected is None else Vocabulary.of(prefix, manifest).differences(expected)
    if expected is not None and differing:
        yield (
            f"dataset {prefix} was made with another tokenizer than {expected.origin}: "
            f"{', '.join(differing)}. Use the tokenizer that made it, or make it again."
        )
    if manifest.max_token_id >= vocab_size:
        yield outside_vocabulary(prefix, manifest.max_token_id, vocab_size)
    elif manifest.vocab_size > vocab_size:
        yield (
            f"model.vocab_size={vocab_size} is smaller than the vocabulary of dataset {prefix}, "
            f"{manifest.vocab_size}. Leave it unset, or set it to that."
        )


def _token_problems(
    prefix: str, info: IndexInfo, vocab_size: int, needs_eod: list[str], expected: Vocabulary | None
) -> Iterator[str]:
    """Look at tokens spread evenly over a dataset."""
    tokens = OpenFile(Path(f"{prefix}.bin"), f"Copy it again, or make it with {REMEDY}.")
    count, size = min(_PROBE_TOKENS, info.tokens), info.dtype.itemsize
    eod_seen = False
    for start in np.linspace(0, info.tokens - count, _PROBES, dtype=np.int64).tolist():
        probe = np.frombuffer(tokens.read(start * size, count * size), info.dtype)
        lowest, highest = int(probe.min()), int(probe.max())
        if lowest < 0 or highest >= vocab_size:
            yield outside_vocabulary(prefix, lowest if lowest < 0 else highest, vocab_size)
            break
        eod_seen = eod_seen or (expected is not None and bool((probe == expected.eod).any()))
    if needs_eod and expected is None:
        yield (
            f"data.{needs_eod[0]}=true needs to know the end-of-document token. Set data.tokenizer_type and "
            "tokenizer_model."
        )
    elif needs_eod and not eod_seen:
        yield _no_eod(needs_eod[0], prefix)


def _no_eod(setting: str, prefix: str) -> str:
    return (
        f"data.{setting}=true would do nothing: the documents of {prefix} have no end-of-document token. "
        "Make it again with --append-eod."
    )
