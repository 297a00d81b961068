"""Metrics: every number derived from a record's samples, defined once.

A sample is one repetition's measurement; its name ends in its unit. A metric is an estimate over the repetitions. All
metrics follow from a record's labels, facts and samples: a record cannot claim what it did not measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from qwen3fast.bench.statistics import Estimate, estimate


@dataclass(frozen=True)
class Metric:
    """The name and format of a metric.

    format: of `str.format`, for the value times `scale`; "" is `duration` for seconds, otherwise `short`.
    """

    title: str
    unit: str
    is_higher_better: bool
    format: str = ""
    scale: float = 1.0

    def text(self, value: float) -> str:
        """Return the value as the text of a table cell."""
        if self.format:
            return self.format.format(value * self.scale)
        return duration(value) if self.unit == "s" else short(value * self.scale)


def duration(seconds: float) -> str:
    """Return seconds with a unit: 12.3 s, 1.25 s, 136 ms, 1.8 ms."""
    if seconds >= 1:
        return f"{short(seconds)} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def short(value: float) -> str:
    """Return three digits, or all before the point of a larger number: 2,034, 27.6, 0.43."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


METRICS = {
    "decode_tok_s": Metric("decode tok/s", "tokens/s", True),
    "prefill_tok_s": Metric("prefill tok/s", "tokens/s", True),
    "tok_s": Metric("tok/s", "tokens/s", True),
    "ttft_s": Metric("first token", "s", False),
    "step_ms": Metric("p50 ms", "ms", False),
    "step_p99_ms": Metric("p99 ms", "ms", False),
    "ttft_p99_s": Metric("first token p99", "s", False),
    "itl_ms": Metric("between tokens", "ms", False),
    "itl_p99_ms": Metric("between tokens p99", "ms", False),
    "tpot_ms": Metric("per token", "ms", False),
    "requests_s": Metric("requests/s", "1/s", True, "{:.2f}"),
    "goodput": Metric("good requests/s", "1/s", True, "{:.2f}"),
    "http_over_engine": Metric("HTTP / engine", "", False, "{:.3f}"),
    "effective_gb_s": Metric("GB/s", "GB/s", True, "{:.1f}"),
    "share_of_bandwidth": Metric("of bandwidth", "", True, "{:.0%}"),
    "prefill_flop_s": Metric("prefill GFLOP/s", "GFLOP/s", True, "{:.0f}", 1e-9),
    "prefill_share_of_gemm": Metric("of GEMM rate", "", True, "{:.0%}"),
    "limit_tok_s": Metric("limit tok/s", "tokens/s", True),
    "peak_memory_bytes": Metric("peak memory", "bytes", False, "{:.2f} GB", 1e-9),
    "seconds": Metric("seconds", "s", False),
    "import_s": Metric("import", "s", False, "{:.1f} s"),
    "load_s": Metric("load", "s", False),
    "file_gb_s": Metric("GB/s from files", "GB/s", True, "{:.2f}"),
    "own_bytes": Metric("own memory", "bytes", False, "{:.2f} GB", 1e-9),
    "mapped_bytes": Metric("mapped pages", "bytes", False, "{:.2f} GB", 1e-9),
    "first_token_s": Metric("first token", "s", False, "{:.1f} s"),
    "full_speed_s": Metric("full speed", "s", False, "{:.1f} s"),
    "operator_ms": Metric("ms", "ms", False, "{:.2f}"),
    "launches": Metric("launches", "", False, "{:.0f}"),
    "triton_kernels": Metric("Triton kernels", "", False, "{:.0f}"),
    "library_calls": Metric("library calls", "", False, "{:.0f}"),
    "eager_calls": Metric("eager operations", "", False, "{:.0f}"),
    "shared_bytes": Metric("most shared memory", "bytes", False, "{:.1f} KiB", 1 / 1024),
    "key_error": Metric("key error", "", False, "{:.2%}"),
    "value_error": Metric("value error", "", False, "{:.2%}"),
    "weight_error": Metric("weight error", "", False, "{:.2%}"),
    "output_error": Metric("output error", "", False, "{:.2%}"),
    "over_int4": Metric("time over int4's", "", False, "{:.2f}"),
    "over_int8": Metric("time over int8's", "", False, "{:.2f}"),
    "logit_error": Metric("logit error", "", False, "{:.2%}"),
    "perplexity": Metric("perplexity", "", False, "{:.4f}"),
    "kl_divergence": Metric("KL divergence", "nats", False),
    "kl_p99": Metric("KL p99", "nats", False),
    "same_token": Metric("same most likely token", "", True, "{:.1%}"),
    "accuracy": Metric("accuracy", "", True, "{:.1%}"),
}

# Title, unit and scale of the machine's own speeds.
CONDITIONS = {"bandwidth_gb_s": ("Memory reads", "GB/s", 1.0), "gemm_flop_s": ("Matrix product", "GFLOP/s", 1e-9)}


def derive(labels: Mapping[str, Any], facts: Mapping[str, float], samples: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return an estimate of each metric that the samples allow, over its values of `per_repetition`."""
    return {name: estimate(values) for name, values in per_repetition(labels, facts, samples).items()}


def per_repetition(
    labels: Mapping[str, Any], facts: Mapping[str, float], samples: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Return all metrics that the samples allow, one value per repetition.

    samples: name -> list with one entry per repetition, which is itself a list for "step_s" (each step), "ttfts_s"
    (each request) and "itl_s" (each gap). labels: batch_size and context are read, if given. facts: bytes_per_step of a
    decode step, flop_per_step if arithmetic may limit it, prefill_flop of the whole prompt; tokens, requests and
    file_bytes of the work that "seconds" measures.
    Speeds and shares use the bandwidth measured beside the same repetition.
    Definitions: ttft_s is from the call to the first token of all batch rows. decode_tok_s is batch_size / the
    repetition's median step: it never counts the prompt, except without a cache, where each token computes everything
    and the first token may be the step (Session.task). step_p99_ms is over all steps of all repetitions: one value.
    """
    values = {name: list(entries) for name, entries in samples.items() if name in METRICS}
    values |= _of_steps(labels, facts, samples)
    values |= _of_first_token(labels, facts, samples)
    values |= _of_clients(samples)
    if "seconds" in samples and "tokens" in facts:
        values["tok_s"] = [facts["tokens"] / s for s in samples["seconds"]]
    if "seconds" in samples and "requests" in facts:
        values["requests_s"] = [facts["requests"] / s for s in samples["seconds"]]
    if "seconds" in samples and "file_bytes" in facts:
        values["file_gb_s"] = [facts["file_bytes"] / s / 1e9 for s in samples["seconds"]]
    return {name: entries for name, entries in values.items() if entries}


def _of_steps(
    labels: Mapping[str, Any], facts: Mapping[str, float], samples: Mapping[str, Any]
) -> dict[str, list[float]]:
    repetitions = [steps for steps in samples.get("step_s", []) if steps]
    if not repetitions:
        return {}
    medians = [median(steps) for steps in repetitions]
    everything = sorted(s for steps in repetitions for s in steps)
    values = {
        "step_ms": [s * 1e3 for s in medians],
        "step_p99_ms": [percentile(everything, 0.99) * 1e3],
        "decode_tok_s": [labels.get("batch_size", 1) / s for s in medians],
    }
    if "bytes_per_step" in facts:
        gb_s = [facts["bytes_per_step"] / s / 1e9 for s in medians]
        values["effective_gb_s"] = gb_s
        if len(bandwidth := samples.get("bandwidth_gb_s", [])) == len(gb_s):
            values["share_of_bandwidth"] = [a / b for a, b in zip(gb_s, bandwidth, strict=True)]
            values["limit_tok_s"] = _limits(labels, facts, samples)
    return values


def _limits(labels: Mapping[str, Any], facts: Mapping[str, float], samples: Mapping[str, Any]) -> list[float]:
    """Return the tokens/s of a step that reads its bytes at the measured bandwidth and, if it has "flop_per_step", does
    its arithmetic at the measured rate of the matrix product, per repetition."""
    least_s = [facts["bytes_per_step"] / gb_s / 1e9 for gb_s in samples["bandwidth_gb_s"]]
    if "flop_per_step" in facts and len(rates := samples.get("gemm_flop_s", [])) == len(least_s):
        least_s = [max(s, facts["flop_per_step"] / rate) for s, rate in zip(least_s, rates, strict=True)]
    return [labels.get("batch_size", 1) / s for s in least_s]


def _of_first_token(
    labels: Mapping[str, Any], facts: Mapping[str, float], samples: Mapping[str, Any]
) -> dict[str, list[float]]:
    ttft_s = samples.get("ttft_s", [])
    if not ttft_s:
        return {}
    values = {"ttft_s": list(ttft_s)}
    if "context" in labels:
        values["prefill_tok_s"] = [labels["context"] * labels.get("batch_size", 1) / s for s in ttft_s]
    if "prefill_flop" in facts:
        values["prefill_flop_s"] = [facts["prefill_flop"] / s for s in ttft_s]
        if len(rates := samples.get("gemm_flop_s", [])) == len(ttft_s):
            values["prefill_share_of_gemm"] = [
                facts["prefill_flop"] / s / rate for s, rate in zip(ttft_s, rates, strict=True)
            ]
    return values


def _of_clients(samples: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the latency that clients saw, from each repetition's first tokens and gaps between tokens."""
    values: dict[str, list[float]] = {}
    if per_token := samples.get("tpot_s"):
        values["tpot_ms"] = [s * 1e3 for s in per_token]
    if firsts := [sorted(entry) for entry in samples.get("ttfts_s", []) if entry]:
        values |= {"ttft_s": [median(f) for f in firsts], "ttft_p99_s": [percentile(f, 0.99) for f in firsts]}
    if gaps := [sorted(entry) for entry in samples.get("itl_s", []) if entry]:
        values |= {"itl_ms": [median(g) * 1e3 for g in gaps], "itl_p99_ms": [percentile(g, 0.99) * 1e3 for g in gaps]}
    return values


def percentile(ordered: list[float], share: float) -> float:
    """Return the smallest of the sorted values that at least `share` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
