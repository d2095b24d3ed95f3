"""Datasets, such as the shards of one job, appended to one another."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ext.data.description import (
    DatasetManifest,
    differences_of_meaning,
    manifest_bytes,
    manifest_path,
    read_manifest,
)
from megatron_ext.data.index_checks import check_index
from megatron_ext.data.indexed import merge_datasets
from megatron_ext.data.outputs import OutputFiles, existing_prefixes, refuse_inputs
from megatron_ext.data.parts import Part
from megatron_ext.data.prefix_lock import locked
from megatron_ext.errors import ConfigError


def merge_shards(prefixes: Sequence[str], output_prefix: str, *, overwrite: bool = False) -> DatasetManifest:
    """Append datasets, such as the shards or parts of one job, to one another without loading them. Returns
    the manifest.

    Raises ConfigError if one is damaged, if they were made by different tokenizers, or if a shard or part of
    a job is missing; and if the output would replace an input or something that is no dataset, or, without
    `overwrite`, another dataset.
    """
    merged = _merged(prefixes, _manifests(prefixes))
    with locked([output_prefix]):
        return _write(prefixes, output_prefix, merged, overwrite=overwrite)


def _write(
    prefixes: Sequence[str], output_prefix: str, merged: DatasetManifest, *, overwrite: bool
) -> DatasetManifest:
    existing = existing_prefixes(output_prefix, [""], sharded=False)
    refuse_inputs(existing, [f"{prefix}.{name}" for prefix in prefixes for name in ("bin", "idx")])
    output = OutputFiles(output_prefix)
    output.check_ours()
    output.finish_interrupted()
    before = read_manifest(output_prefix)
    done = before is not None and before == merged and before.content != ""
    if before is not None and not done and not overwrite:
        raise ConfigError(
            f"{output_prefix} is a dataset already, and another one. Give another --output-prefix, or "
            "--overwrite to replace it."
        )
    if done and not overwrite:
        check_index(output_prefix)
        return merged
    for prefix in prefixes:
        check_index(prefix)
    if before is not None:
        output.remove()
    merge_datasets(prefixes, output_prefix, manifest_bytes(merged))
    return merged


def _manifests(prefixes: Sequence[str]) -> dict[str, DatasetManifest]:
    manifests: dict[str, DatasetManifest] = {}
    places: dict[Path, str] = {}
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        if manifest is None:
            raise ConfigError(
                f"{manifest_path(prefix)} not found: only complete datasets of this tool can be merged."
            )
        if (first := places.setdefault(Path(f"{prefix}.bin").resolve(), prefix)) != prefix:
            raise ConfigError(f"{prefix} is given twice (the same dataset as {first}).")
        if prefix in manifests:
            raise ConfigError(f"{prefix} is given twice.")
        manifests[prefix] = manifest
    return manifests


def _merged(prefixes: Sequence[str], manifests: Mapping[str, DatasetManifest]) -> DatasetManifest:
    first = manifests[prefixes[0]]
    for prefix, manifest in manifests.items():
        if differing := differences_of_meaning(manifest, first):
            raise ConfigError(f"{prefix} and {prefixes[0]} cannot be merged: {', '.join(differing)} differs.")
    _check_no_shard_missing(manifests)
    _check_no_part_missing(manifests)
    return replace(
        first,
        documents=sum(manifest.documents for manifest in manifests.values()),
        tokens=sum(manifest.tokens for manifest in manifests.values()),
        max_token_id=max(manifest.max_token_id for manifest in manifests.values()),
        skipped_records=sum(manifest.skipped_records for manifest in manifests.values()),
        sources=tuple(
            dict.fromkeys(source for manifest in manifests.values() for source in manifest.sources)
        ),
        shard=None,
        part=None,
        content=_content(manifests),
    )


def _content(manifests: Mapping[str, DatasetManifest]) -> str:
    """A hash that tells one merged dataset from another; "" if the content of a part is not known."""
    parts = [manifest.content for manifest in manifests.values()]
    return hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest() if all(parts) else ""


def _check_no_shard_missing(manifests: Mapping[str, DatasetManifest]) -> None:
    expected, before = 0, ""
    for prefix, manifest in manifests.items():
        index = 0 if manifest.shard is None else manifest.shard.index
        if index != expected:
            raise ConfigError(
                f"cannot merge: before {prefix}, shard number {index}, belongs shard number {expected}. Give "
                "all shards of "
                "a job, in order."
            )
        expected = 0 if manifest.shard is None or manifest.shard.final else index + 1
        before = prefix
    if expected:
        raise ConfigError(
            f"cannot merge: {before} is not the last shard of its job. Give all of them; if they are not "
            "there yet, run the "
            "job again to finish it."
        )


def _check_no_part_missing(manifests: Mapping[str, DatasetManifest]) -> None:
    before: tuple[str, Part] | None = None
    """Of an unfinished job: its newest part."""
    current: Part | None = None
    for prefix, manifest in manifests.items():
        part = manifest.part
        if manifest.shard is not None and manifest.shard.index > 0:
            if part != current:
                raise ConfigError(
                    f"cannot merge: {prefix} is a shard of another part than the shard before it. Give all "
                    "shards of a part, then those of the next one."
                )
            continue
        _check_follows(before, prefix, part)
        current = part
        before = None if part is None or part.index == part.count - 1 else (prefix, part)
    if before is not None:
        raise _part_missing(f"{before[0]} is not the last one", before[1])


def _check_follows(before: tuple[str, Part] | None, prefix: str, part: Part | None) -> None:
    """`part`, that of `prefix`, begins a job, or goes on where the part before it ends."""
    expected = 0 if before is None else before[1].index + 1
    if part is None:
        if before is not None:
            raise _part_missing(f"{prefix} is none", before[1])
    elif part.index != expected or (before is not None and part.count != before[1].count):
        raise _part_missing(f"{prefix} is where {expected} belongs", before[1] if before else part)
    elif before is not None and part.files != before[1].files:
        raise ConfigError(
            f"cannot merge: {before[0]} and {prefix} are parts of different lists of files: files came, went "
            "or changed between the jobs. Make the parts again with --overwrite."
        )


def _part_missing(what: str, part: Part) -> ConfigError:
    return ConfigError(
        f"cannot merge: parts 0 to {part.count - 1} of {part.count} belong together, and {what}. Give "
        "all parts of a job, in order; if they are not there yet, wait for their jobs or run them again."
    )
