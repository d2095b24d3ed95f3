"""The scores of several models side by side, with what their caches cost."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lckv_megatron.cache_facts import cache_line
from lckv_megatron.tables import markdown_table

Results = Mapping[str, Any]
"""Of one model: what lm-eval returns, and `cache`, a dict of `CacheFacts`."""

_NO_METRICS = ("alias", "name", "sample_len", "sample_count")
_ARROWS = {True: "\u2191", False: "\u2193"}


def column_names(folders: Sequence[Path]) -> list[str]:
    """A name for each model: the last parts of its path, as many as tell it from the others, and a number
    where a folder is there twice."""
    names: list[str] = []
    paths = [folder.absolute().parts for folder in folders]
    for number, parts in enumerate(paths):
        others = [other for other in paths if other != parts]
        kept = next(
            count
            for count in range(1, len(parts) + 1)
            if count == len(parts) or all(other[-count:] != parts[-count:] for other in others)
        )
        again = paths[:number].count(parts)
        names.append("/".join(parts[-kept:]) + (f" ({again + 1})" if again else ""))
    return names


def describe(scores: Mapping[str, Results]) -> Iterator[str]:
    """A Markdown table with a column for each model, and a line on each one's cache."""
    yield from markdown_table(_rows(scores))
    yield ""
    for name, results in scores.items():
        yield (f"{name}: " if len(scores) > 1 else "") + cache_line(results["cache"])


def _rows(scores: Mapping[str, Results]) -> Iterator[tuple[str, ...]]:
    yield ("task", "version", "filter", "n-shot", "metric", "", *scores)
    first = next(iter(scores.values()))
    for task, entry in _entries(first).items():
        for metric, filtered in _metrics(entry):
            better = first.get("higher_is_better", {}).get(task, {}).get(metric)
            yield (
                str(entry.get("alias", task)),
                str(first.get("versions", {}).get(task, "")),
                filtered,
                str(first.get("n-shot", {}).get(task, "")),
                metric,
                _ARROWS.get(better, ""),
                *(_cell(_entries(results).get(task, {}), metric, filtered) for results in scores.values()),
            )
    caches = [results["cache"] for results in scores.values()]
    for what, arrow, cells in (
        ("bytes per token", False, [f"{cache['kv_bytes_per_token']:,.0f}" for cache in caches]),
        ("tokens per slot", True, [f"{cache['compression_ratio']:.2f}" for cache in caches]),
        ("compression", True, [f"{_compression(cache):.2f}x" for cache in caches]),
    ):
        yield ("KV cache", "", "measured", "", what, _ARROWS[arrow], *cells)


def _entries(results: Results) -> dict[str, Mapping[str, Any]]:
    """Of tasks and groups of them."""
    return {**results["results"], **results.get("groups", {})}


def _metrics(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Metric and filter."""
    for name in sorted(entry):
        metric, _, filtered = name.partition(",")
        if name not in _NO_METRICS and not metric.endswith("_stderr"):
            yield metric, filtered


def _cell(entry: Mapping[str, Any], metric: str, filtered: str) -> str:
    value, error = (entry.get(f"{name},{filtered}") for name in (metric, f"{metric}_stderr"))
    shown = f"{value:.4f}" if isinstance(value, float) else str(" " if value is None else value)
    return f"{shown} \u00b1 {error:.4f}" if isinstance(error, float) else shown


def _compression(cache: Mapping[str, Any]) -> float:
    """Of the whole cache: that of a plain model of the same sizes is so many times as large."""
    return cache["plain_kv_bytes_per_token"] / cache["kv_bytes_per_token"]
