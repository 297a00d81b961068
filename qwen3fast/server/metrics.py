"""Metrics for Prometheus, under vLLM's names where the meaning is the same.

Source: vLLM documentation, "Production metrics".
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from qwen3fast.generator import Generator
from qwen3fast.results import GenerationResult, GeneratorStats
from qwen3fast.server.models import Models

FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
REQUEST_BUCKETS_S = (0.1, 0.3, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        model = ["model_name"]
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.", model)
        self._cached_tokens = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the KV cache.", model)
        self._queried_tokens = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up there.", model)
        self._new_tokens = self._counter("vllm:generation_tokens", "Generated tokens.", model)
        self._finished = self._counter(
            "vllm:request_success", "Replies that have ended.", ["model_name", "finished_reason"]
        )
        self._responses = self._counter("qwen3fast:http_responses", "HTTP responses.", ["path", "status"])
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN_BUCKETS_S
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between tokens of a reply.", TOKEN_BUCKETS_S
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From the request to its last token.", REQUEST_BUCKETS_S
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From the request to the start of its prefill.", REQUEST_BUCKETS_S
        )
        self.registry.register(_EngineGauges(models))

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)

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
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests in a slot.", labels=["model_name"])
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait for one.", labels=["model_name"])
        slots = GaugeMetricFamily("qwen3fast:slots", "Slots of the KV cache.", labels=["model_name"])
        memory = GaugeMetricFamily("qwen3fast:kv_cache_bytes", "Bytes of the KV cache.", labels=["model_name"])
        for name, stats in self._stats():
            running.add_metric([name], stats.slots_in_use)
            waiting.add_metric([name], stats.waiting)
            slots.add_metric([name], stats.max_batch_size)
            memory.add_metric([name], stats.kv_cache_bytes)
        return [running, waiting, slots, memory]

    def _stats(self) -> Iterable[tuple[str, GeneratorStats]]:
        for served in self._models.served:
            if isinstance(served.model, Generator):
                try:
                    yield served.name, served.model.stats
                except RuntimeError:  # closed
                    continue
