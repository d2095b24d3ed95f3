"""From raw text to indexed datasets, shard by shard.

A shard is complete when its description is there. A job that is started again goes on behind the last
complete shard, if that is what the job would make now. Without shards the whole output counts as one.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_ext.data.chat import ChatTokenizer
from megatron_ext.data.description import (
    DatasetManifest,
    Shard,
    SourceFile,
    differences_of_meaning,
    manifest_bytes,
    read_manifest,
)
from megatron_ext.data.encoding import (
    Documents,
    EncodedStream,
    EncodingSettings,
    Stretch,
    content_hash,
    encode_records,
)
from megatron_ext.data.index_checks import check_index
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.job import PreprocessingJob
from megatron_ext.data.marks import stored_dtype, unmarked
from megatron_ext.data.outputs import OutputFiles, existing_prefixes, refuse_inputs
from megatron_ext.data.prefix_lock import locked
from megatron_ext.data.sources import Position, RecordReader, check_columns, text_bytes
from megatron_ext.data.tokenizers import content_of, load_tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.signals import deferred

logger = logging.getLogger(__name__)

_LOGGED_BAD_RECORDS = 10


def preprocess(
    job: PreprocessingJob,
    report: Callable[[Stretch, int], None] = lambda stretch, tokens: None,
    *,
    overwrite: bool = False,
) -> dict[str, DatasetManifest]:
    """Do a job, or what is left of it; with `overwrite` all of it, replacing what an earlier job left under
    the same prefix. Returns the manifests by prefix, in order.

    At the start and after each batch `report` gets the stretch of the input that is done, and the number of
    new tokens. Raises ConfigError for bad input (with file and line), for output in the same place that is
    an input, another job's, also of one that is running, or nobody's dataset, and if there is no document at
    all (a part may be without).
    """
    job.check()
    check_columns(job.sources, job.columns)
    run = _Run(job, report)
    with locked(
        [job.output_prefix, *(f"{job.output_prefix}{_key_suffix(job, key)}" for key in job.json_keys)]
    ):
        run.take_place(overwrite=overwrite)
        run.find_complete_shards()
        if not run.complete:
            run.write_shards()
    return run.manifests


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
        tokenizer = load_tokenizer(job.tokenizer_type, job.tokenizer_model)
        self._shard_text_bytes = job.shard_text_bytes
        if job.shards is not None:
            total = text_bytes(job.sources, job.columns)
            self._shard_text_bytes = max(1, math.ceil(total / job.shards))
        self._empty = DatasetManifest(
            tokenizer_type=job.tokenizer_type,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            dtype=str(stored_dtype(job.data_format, tokenizer.vocab_size)),
            append_eod=job.append_eod,
            documents=0,
            tokens=0,
            max_token_id=-1,
            json_key="",
            skipped_records=0,
            sources=tuple(map(SourceFile.of, job.sources)),
            tokenizer_splitting=tokenizer.splitting,
            tokenizer_content=content_of(job.tokenizer_model),
            json_keys=job.json_keys,
            data_format=job.data_format,
            chat_template=(
                ChatTokenizer(Path(job.tokenizer_model)).template if job.data_format == "chat" else ""
            ),
            skip_bad_records=job.skip_bad_records,
            max_document_bytes=job.max_document_bytes,
            part=job.part,
        )

    def take_place(self, *, overwrite: bool) -> None:
        """Look at all that lies where output may go, before anything is touched; remove it if that is
        wanted, else check that this job made it."""
        job = self._job
        keys = [_key_suffix(job, key) for key in job.json_keys]
        prefixes = existing_prefixes(job.output_prefix, keys, sharded=self._shard_text_bytes is not None)
        refuse_inputs(prefixes, [*(source.path for source in job.sources), job.tokenizer_model])
        outputs = [OutputFiles(prefix) for prefix in prefixes]
        for output in outputs:
            output.check_ours()
        for output in outputs:
            if overwrite:
                output.remove()
            else:
                output.finish_interrupted()
        for prefix in prefixes:
            if (manifest := read_manifest(prefix)) is not None:
                self._check_same_job(prefix, manifest)

    def _prefixes(self) -> list[str]:
        """Prefixes of the next shard, one for each key."""
        shard = "" if self._shard_text_bytes is None else f"-{self._shards:05d}"
        return [
            f"{self._job.output_prefix}{shard}{_key_suffix(self._job, key)}" for key in self._job.json_keys
        ]

    def find_complete_shards(self) -> None:
        """Take over the shards that an earlier run of the same job has completed."""
        while not self.complete:
            shard = {prefix: manifest for prefix in self._prefixes() if (manifest := read_manifest(prefix))}
            if len(shard) < len(self._job.json_keys):
                return
            for prefix, manifest in shard.items():
                check_index(prefix)
                self._check_same_content(prefix, manifest)
            logger.info("found complete: %s", ", ".join(shard))
            self._take_over(shard)

    def _check_same_job(self, prefix: str, manifest: DatasetManifest) -> None:
        if not manifest.tokenizer_content:
            raise _of_another_job(prefix, "an earlier version made it, which did not note all that matters")
        key = manifest.json_key
        ours = key in self._job.json_keys and prefix.endswith(_key_suffix(self._job, key))
        differing = [*_differences(manifest, replace(self._empty, json_key=key if ours else ""))]
        if (manifest.shard and manifest.shard.text_bytes) != self._shard_text_bytes:
            differing.append("size of the shards")
        if differing:
            raise _of_another_job(prefix, f"{', '.join(differing)} differs")

    def _check_same_content(self, prefix: str, manifest: DatasetManifest) -> None:
        """Files that were touched since are read again, as far as the shard goes."""
        if manifest.sources == self._empty.sources:
            return
        logger.info("%s: input files were touched since; they are read to see if they changed", prefix)
        end = None if manifest.shard is None or manifest.shard.final else manifest.shard.end
        if manifest.content != content_hash(self._reader(), end):
            raise _of_another_job(prefix, "the content of the input differs")

    def _reader(self) -> RecordReader:
        job = self._job
        return RecordReader(
            job.sources,
            self._start,
            job.max_document_bytes,
            columns=job.columns,
            skips_long=job.skip_bad_records,
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
            job.tokenizer_type,
            job.tokenizer_model,
            job.json_keys,
            job.append_eod,
            job.skip_bad_records,
            job.data_format,
        )
        reader = self._reader()
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
            with deferred():  # what is begun is also abandoned
                writers = [
                    stack.enter_context(IndexedWriter(prefix, np.dtype(self._empty.dtype)))
                    for prefix in shard
                ]
            for stretch, encoded in stream:
                for prefix, writer, documents in zip(shard, writers, encoded.by_key, strict=True):
                    writer.add(documents.tokens, documents.lengths)
                    shard[prefix] = _extended(shard[prefix], documents, len(encoded.bad))
                self._log_bad(encoded.bad)
                self._report(stretch, sum(len(documents.tokens) for documents in encoded.by_key))
                if stretch.closes_shard:
                    break
            nothing = not any(m.documents for m in (*self.manifests.values(), *shard.values()))
            if stretch.final and nothing and self._job.part is None:
                raise ConfigError(
                    f"no document in {', '.join(s.path for s in self._job.sources[:3])}: all are empty or "
                    "bad."
                )
            size = self._shard_text_bytes
            place = None if size is None else Shard(self._shards, stretch.final, size, stretch.end)
            for writer, (prefix, manifest) in zip(writers, [*shard.items()], strict=True):
                shard[prefix] = replace(manifest, shard=place, content=stretch.content)
                writer.close(manifest_bytes(shard[prefix]))
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
        max_token_id=max(manifest.max_token_id, _highest(documents.tokens)),
        skipped_records=manifest.skipped_records + bad_records,
    )


def _highest(stored: np.ndarray) -> int:
    return int(unmarked(stored).max()) if len(stored) else -1


def _of_another_job(prefix: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{prefix} is of another job: {reason}. Give another --output-prefix, or --overwrite to begin again."
    )


def _differences(theirs: DatasetManifest, ours: DatasetManifest) -> Iterator[str]:
    """In what a dataset is not what this job would make, as far as the manifests tell."""
    yield from differences_of_meaning(theirs, ours)
    for name in ("tokenizer_type", "tokenizer_content", "json_key", "json_keys", "part"):
        if getattr(theirs, name) != getattr(ours, name):
            yield name
    if [source.identity for source in theirs.sources] != [source.identity for source in ours.sources]:
        yield "sources"
    if theirs.skipped_records and not ours.skip_bad_records:
        yield "skip_bad_records"
    shorter = ours.max_document_bytes < theirs.max_document_bytes
    longer = ours.max_document_bytes > theirs.max_document_bytes
    if shorter or (longer and theirs.skipped_records):
        yield "max_document_bytes"
