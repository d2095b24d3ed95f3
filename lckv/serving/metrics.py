"""What Prometheus reads: the engine's counters and gauges when it asks,
and the server's answers by status."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lckv.generation.engine import Engine

_COUNTERS = {
    "generated_tokens": "Tokens generated",
    "prompt_tokens": "Tokens of prompts",
    "cached_prompt_tokens": "Tokens of prompts that earlier requests had computed",
    "finished": "Requests that were answered",
    "cancelled": "Requests that were cancelled",
    "drafted_tokens": "Tokens guessed ahead by speculative decoding",
    "accepted_tokens": "Guessed tokens that came",
    "preemptions": "Times that a request gave its pages to others",
}
_GAUGES = {
    "tokens_per_second": "Tokens generated per second, recently",
    "running": "Requests being answered",
    "waiting": "Requests that wait",
    "pages_in_use": "Pages of the KV cache that requests hold",
    "pages_kept": "Pages of the KV cache that only beginnings kept for later requests hold",
    "prefixes": "Beginnings that are kept for later requests",
    "pages_free": "Pages of the KV cache that are free",
    "draft_acceptance": "Share of guessed tokens that came",
    "compression_ratio": "Tokens per slot of the KV cache, measured over what is in it",
}


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"lckv_{name}", text, value=getattr(stats, name))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"lckv_{name}", text, value=getattr(stats, name))


class ServerMetrics:
    """A registry of its own, so that several servers can live in one process."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._responses = Counter(
            "lckv_http_responses", "Answers by path and status", ["path", "status"], registry=self._registry
        )
        self.first_token_seconds = Histogram(
            "lckv_first_token_seconds", "Seconds from a request to its first token", registry=self._registry
        )

    def count(self, path: str, status: int) -> None:
        """Count one answer. `path` is that of a route, never what a client has made up."""
        self._responses.labels(path, status).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
