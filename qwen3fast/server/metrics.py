"""Metrics for Prometheus, under vLLM's names where the meaning is the same.

Source: vLLM documentation, "Production metrics".
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from qwen3fast.generator import Generator
from qwen3fast.results import GenerationResult
from qwen3fast.server.models import Models

FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
REQUEST_BUCKETS_S = (0.1, 0.3, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
MODEL = ["model_name"]  # the label of most metrics
# Fields of GeneratorStats: name and description of their gauges.
GAUGES = {
    "slots_in_use": ("vllm:num_requests_running", "Requests in a slot."),
    "waiting": ("vllm:num_requests_waiting", "Requests that wait for one."),
    "max_batch_size": ("qwen3fast:slots", "Slots of the KV cache."),
    "kv_cache_bytes": ("qwen3fast:kv_cache_bytes", "Bytes of the KV cache."),
}


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.", MODEL)
        self._cached_tokens = counter("vllm:prefix_cache_hits", "Prompt tokens found in the KV cache.", MODEL)
        self._queried_tokens = counter("vllm:prefix_cache_queries", "Prompt tokens looked up there.", MODEL)
        self._new_tokens = counter("vllm:generation_tokens", "Generated tokens.", MODEL)
        self._finished = counter("vllm:request_success", "Replies that have ended.", [*MODEL, "finished_reason"])
        self._responses = counter("qwen3fast:http_responses", "HTTP responses.", ["path", "status"])
        histogram = partial(Histogram, labelnames=MODEL, registry=self.registry, buckets=REQUEST_BUCKETS_S)
        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", buckets=FIRST_TOKEN_BUCKETS_S
        )
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between tokens.", buckets=TOKEN_BUCKETS_S
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From the request to its last token.")
        self._queue = histogram("vllm:request_queue_time_seconds", "From the request to the start of its prefill.")
        self.registry.register(_EngineGauges(models))

    def observe(self, name: str, result: GenerationResult) -> None:
        """Count a finished reply of the model with that name."""
        metrics = result.metrics
        self._prompt_tokens.labels(name).inc(metrics.prompt_tokens)
        self._queried_tokens.labels(name).inc(metrics.prompt_tokens)
        self._cached_tokens.labels(name).inc(metrics.reused_tokens)
        self._new_tokens.labels(name).inc(metrics.new_tokens)
        self._finished.labels(name, result.finish_reason).inc()
        self._first_token.labels(name).observe(metrics.time_to_first_token_s)
        self._queue.labels(name).observe(metrics.queue_s)
        self._whole.labels(name).observe(metrics.time_to_first_token_s + metrics.decode_s)
        if metrics.new_tokens > 1:
            self._per_token.labels(name).observe(metrics.decode_s / (metrics.new_tokens - 1))

    def count_response(self, path: str, status: int) -> None:
        """Count an HTTP response. path: a route of the server, not the path that a client sent."""
        self._responses.labels(path, str(status)).inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineGauges(Collector):
    """Gauges, read from the Generators at each request for metrics."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the current gauges; none before the server runs (registering calls this as well)."""
        gauges = {field: GaugeMetricFamily(name, text, labels=MODEL) for field, (name, text) in GAUGES.items()}
        for served in self._models.served:
            if isinstance(served.model, Generator):
                with suppress(RuntimeError):  # closed
                    stats = served.model.stats
                    for field, gauge in gauges.items():
                        gauge.add_metric([served.name], getattr(stats, field))
        return gauges.values()
