"""From raw text to indexed datasets, shard by shard.

A shard is complete when its manifest is there. A job that is started again goes on behind the last complete
shard. Without shards the whole output counts as one.
"""

import contextlib
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_ext.data.encoding import Documents, EncodedStream, EncodingSettings, Stretch, encode_records
from megatron_ext.data.indexed import IndexedWriter, merge_datasets, read_index, token_dtype
from megatron_ext.data.manifest import DatasetManifest, Shard, SourceFile, read_manifest, write_manifest
from megatron_ext.data.sources import Position, RecordReader, Source, text_bytes
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

_LOGGED_BAD_RECORDS = 10
_MEANING = ("tokenizer_fingerprint", "vocab_size", "eod", "dtype", "append_eod")
"""Fields in which two manifests must agree for their tokens to mean the same."""


@dataclass(frozen=True)
class PreprocessingJob:
    """What to make of which files."""

    sources: tuple[Source, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON lines to take texts from. Of several keys each has its own dataset, PREFIX_KEY."""

    append_eod: bool = True
    """End every document with the tokenizer's end-of-document token."""

    workers: int = 1
    """Processes that tokenize; 1: this one does."""

    shards: int | None = None
    """Split the output into (at most) so many shards of about equal size."""

    shard_text_bytes: int | None = None
    """Instead of `shards`: size of a shard in bytes of input text."""

    skip_bad_records: bool = False
    """Leave out records that are no valid documents, instead of stopping."""

    max_document_bytes: int = 1 << 26
    """Longest document, which bounds memory."""


def preprocess(
    job: PreprocessingJob, report: Callable[[Stretch, int], None] = lambda stretch, tokens: None
) -> dict[str, DatasetManifest]:
    """Do a job, or what is left of it. Returns the manifests by prefix, in order.

    At the start and after each batch `report` gets the stretch of the input that is done, and the number of
    new tokens. Raises ConfigError for bad input (with file and line), output of another job in the same
    place, or no document at all.
    """
    if len(job.json_keys) > 1 and (text := next((s for s in job.sources if not s.jsonl), None)):
        raise ConfigError(
            f"--json-keys {' '.join(job.json_keys)} needs JSON lines, but {text.path} is a text."
        )
    run = _Run(job, report)
    run.find_complete_shards()
    if not run.complete:
        run.write_shards()
    return run.manifests


def remove_output(job: PreprocessingJob) -> None:
    """Delete what an earlier job left under the same output prefix, shards included."""
    prefix = Path(job.output_prefix)
    keys = "|".join(re.escape(_key_suffix(job, key)) for key in job.json_keys)
    name = re.compile(rf"{re.escape(prefix.name)}(-\d{{5}})?({keys})\.(bin|idx|json)")
    for path in prefix.parent.glob("*"):
        if name.fullmatch(path.name):
            path.unlink()


def _key_suffix(job: PreprocessingJob, key: str) -> str:
    return f"_{key}" if len(job.json_keys) > 1 else ""


class _Run:
    """The state of a job: manifests of the complete shards, and where in the input the next one begins."""

    def __init__(self, job: PreprocessingJob, report: Callable[[Stretch, int], None]) -> None:
        self.manifests: dict[str, DatasetManifest] = {}
        self.complete = False
        self._job = job
        self._report = report
        self._shards = 0
        self._bad_records = 0
        self._start = Position()
        self._shard_text_bytes = job.shard_text_bytes
        if job.shards is not None:
            self._shard_text_bytes = max(1, math.ceil(text_bytes(job.sources) / job.shards))
        tokenizer = load_tokenizer(job.tokenizer_type, job.tokenizer_model)
        self._empty = DatasetManifest(
            tokenizer_type=job.tokenizer_type,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            dtype=str(token_dtype(tokenizer.vocab_size)),
            append_eod=job.append_eod,
            documents=0,
            tokens=0,
            max_token_id=-1,
            json_key="",
            skipped_records=0,
            sources=tuple(SourceFile(source.path, source.size) for source in job.sources),
        )

    def _prefixes(self) -> list[str]:
        """Prefixes of the next shard, one for each key."""
        shard = "" if self._shard_text_bytes is None else f"-{self._shards:05d}"
        return [
            f"{self._job.output_prefix}{shard}{_key_suffix(self._job, key)}" for key in self._job.json_keys
        ]

    def find_complete_shards(self) -> None:
        """Take over the shards that an earlier run of the same job has completed."""
        while not self.complete:
            manifests = {
                prefix: manifest for prefix in self._prefixes() if (manifest := read_manifest(prefix))
            }
            if len(manifests) < len(self._job.json_keys):
                return
            for key, (prefix, manifest) in zip(self._job.json_keys, manifests.items(), strict=True):
                self._check_same_job(prefix, manifest, replace(self._empty, json_key=key))
                read_index(prefix)
            logger.info("found complete: %s", ", ".join(manifests))
            self._take_over(manifests)

    def _check_same_job(self, prefix: str, manifest: DatasetManifest, expected: DatasetManifest) -> None:
        for name in (*_MEANING, "json_key", "sources"):
            if getattr(manifest, name) != getattr(expected, name):
                raise ConfigError(
                    f"{prefix}.json is of another job: {name} differs. Give another --output-prefix, or "
                    "--overwrite to begin again."
                )
        if (manifest.shard and manifest.shard.text_bytes) != self._shard_text_bytes:
            raise ConfigError(
                f"{prefix}.json is of a job with shards of another size. Give the same, or --overwrite to "
                "begin again."
            )

    def _take_over(self, shard: dict[str, DatasetManifest]) -> None:
        self.manifests |= shard
        self._shards += 1
        place = next(iter(shard.values())).shard
        self.complete = place is None or place.final
        self._start = Position() if place is None else place.end

    def write_shards(self) -> None:
        """Tokenize the rest of the input."""
        job = self._job
        settings = EncodingSettings(
            job.tokenizer_type, job.tokenizer_model, job.json_keys, job.append_eod, job.skip_bad_records
        )
        reader = RecordReader(job.sources, self._start, job.max_document_bytes)
        self._report(Stretch(self._start, reader.disk_bytes), 0)
        stream = encode_records(
            reader, settings, workers=job.workers, shard_text_bytes=self._shard_text_bytes
        )
        with contextlib.closing(stream):
            while not self.complete:
                self._write_shard(stream)

    def _write_shard(self, stream: EncodedStream) -> None:
        shard = {
            prefix: replace(self._empty, json_key=key)
            for prefix, key in zip(self._prefixes(), self._job.json_keys, strict=True)
        }
        with ExitStack() as stack:
            writers = [
                stack.enter_context(IndexedWriter(prefix, np.dtype(self._empty.dtype))) for prefix in shard
            ]
            for stretch, encoded in stream:
                for prefix, writer, documents in zip(shard, writers, encoded.by_key, strict=True):
                    writer.add(documents.tokens, documents.lengths)
                    shard[prefix] = _extended(shard[prefix], documents, len(encoded.bad))
                self._log_bad(encoded.bad)
                self._report(stretch, sum(len(documents.tokens) for documents in encoded.by_key))
                if stretch.closes_shard:
                    break
            if stretch.final and not any(m.documents for m in (*self.manifests.values(), *shard.values())):
                raise ConfigError(
                    f"no document in {', '.join(s.path for s in self._job.sources[:3])}: all are empty or "
                    "bad."
                )
            for writer in writers:
                writer.close()
        if self._shard_text_bytes is not None:
            place = Shard(self._shards, stretch.final, self._shard_text_bytes, stretch.end)
            shard = {prefix: replace(manifest, shard=place) for prefix, manifest in shard.items()}
        for prefix, manifest in shard.items():
            write_manifest(prefix, manifest)
        self._take_over(shard)

    def _log_bad(self, messages: Sequence[str]) -> None:
        for message in messages:
            self._bad_records += 1
            if self._bad_records <= _LOGGED_BAD_RECORDS:
                logger.warning("skipped %s", message)


def _extended(manifest: DatasetManifest, documents: Documents, bad_records: int) -> DatasetManifest:
    return replace(
        manifest,
        documents=manifest.documents + len(documents.lengths),
        tokens=manifest.tokens + len(documents.tokens),
        max_token_id=max(manifest.max_token_id, int(documents.tokens.max()) if len(documents.tokens) else -1),
        skipped_records=manifest.skipped_records + bad_records,
    )


def merge_shards(prefixes: Sequence[str], output_prefix: str) -> DatasetManifest:
    """Append datasets, such as the shards of one job, to one another without loading them. Returns the
    manifest.

    Raises ConfigError if one is damaged, if they were made by different tokenizers,
    or if a shard of a job is missing.
    """
    manifests: dict[str, DatasetManifest] = {}
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        if manifest is None:
            raise ConfigError(f"{prefix}.json not found: only complete datasets of this tool can be merged.")
        if prefix in manifests:
            raise ConfigError(f"{prefix} is given twice.")
        manifests[prefix] = manifest
    first = manifests[prefixes[0]]
    for prefix, manifest in manifests.items():
        for name in _MEANING:
            if getattr(manifest, name) != getattr(first, name):
                raise ConfigError(f"{prefix} and {prefixes[0]} cannot be merged: {name} differs.")
    _check_no_shard_missing(manifests)
    merge_datasets(prefixes, output_prefix)
    merged = replace(
        first,
        documents=sum(manifest.documents for manifest in manifests.values()),
        tokens=sum(manifest.tokens for manifest in manifests.values()),
        max_token_id=max(manifest.max_token_id for manifest in manifests.values()),
        skipped_records=sum(manifest.skipped_records for manifest in manifests.values()),
        sources=tuple(
            dict.fromkeys(source for manifest in manifests.values() for source in manifest.sources)
        ),
        shard=None,
    )
    write_manifest(output_prefix, merged)
    return merged


def _check_no_shard_missing(manifests: Mapping[str, DatasetManifest]) -> None:
    expected, before = 0, ""
    for prefix, manifest in manifests.items():
        index = 0 if manifest.shard is None else manifest.shard.index
        if index != expected:
            raise ConfigError(
                f"cannot merge: before {prefix}, shard number {index}, belongs shard number {expected}. Give "
                "all shards of a job, in order."
            )
        expected = 0 if manifest.shard is None or manifest.shard.final else index + 1
        before = prefix
    if expected:
        raise ConfigError(
            f"cannot merge: {before} is not the last shard of its job. Give all of them; if they are not "
            "there yet, run the job again to finish it."
        )
