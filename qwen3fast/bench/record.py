"""The record of a run: what was measured, on what, every sample, and the figures derived from the samples."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from qwen3fast.bench.measure import Sample, TokenCheck

SCHEMA_VERSION = 1


@dataclass
class Case:
    """One mode at one prompt length and batch size, with all its repetitions.

    bytes_per_token: weights and used KV cache that one decode step must read (the whole batch shares the weights).
    """

    mode: str
    length: int
    batch_size: int
    bytes_per_step: int
    samples: list[Sample] = field(default_factory=list)
    peak_memory_bytes: int | None = None

    def metrics(self, bandwidth_gb_s: float) -> dict[str, float]:
        """Derived figures: medians over repetitions; decode speed counts new tokens only, never the prompt."""
        steps = sorted(s for sample in self.samples for s in sample.step_s)
        p50 = median(steps)
        ttft = median(sample.ttft_s for sample in self.samples)
        gb_s = self.bytes_per_step / p50 / 1e9
        return {
            "ttft_s": ttft,
            "prefill_tok_s": self.length * self.batch_size / ttft,
            "decode_tok_s": self.batch_size / p50,
            "step_p50_ms": p50 * 1e3,
            "step_p99_ms": steps[min(len(steps) - 1, int(0.99 * len(steps)))] * 1e3,
            "effective_gb_s": gb_s,
            "share_of_bandwidth": gb_s / bandwidth_gb_s,
        }


@dataclass
class Record:
    """A whole run. `cases` may be incomplete if `interrupted`."""

    run: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    checks: dict[str, TokenCheck] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    bandwidth_gb_s: float = 0.0
    bandwidth_samples_gb_s: list[float] = field(default_factory=list)
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; samples keep times only (token ids are in `checks`)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "run": self.run,
            "environment": self.environment,
            "model": self.model,
            "read_bandwidth": {"median_gb_s": self.bandwidth_gb_s, "samples_gb_s": self.bandwidth_samples_gb_s},
            "compile_s": self.compile_s,
            "checks": {mode: asdict(check) | {"passed": check.passed} for mode, check in self.checks.items()},
            "interrupted": self.interrupted,
            "cases": [
                {
                    "mode": case.mode,
                    "length": case.length,
                    "batch_size": case.batch_size,
                    "bytes_per_step": case.bytes_per_step,
                    "peak_memory_bytes": case.peak_memory_bytes,
                    "samples": [{"ttft_s": s.ttft_s, "step_s": s.step_s} for s in case.samples],
                    "metrics": case.metrics(self.bandwidth_gb_s),
                }
                for case in self.cases
                if any(sample.step_s for sample in case.samples)
            ],
        }


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write a whole file or none: into a temporary file beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
