"""Benchmark records made up for tests, and a harness that takes no time for probes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from qwen3fast.bench import harness, probes
from qwen3fast.bench.environment import describe_run
from qwen3fast.bench.harness import Task
from qwen3fast.bench.record import Case, Record

ENVIRONMENT = {
    "device": "cpu", "cpu": "Test CPU", "cpu_count": 2, "cpu_affinity": [0, 1], "cpu_flags": ["avx2"],
    "cpu_caches": {"L2": "1024K"}, "threads": 2, "memory_bytes": 2**33, "platform": "Linux-test", "python": "3.11.1",
    "torch": "2.9.0", "qwen3fast": "0.1.0",
}  # fmt: skip
MODEL = {"name": "random:test", "dtype": "bfloat16", "parameters": 1000, "weight_bytes": 2000}


def make_case(tok_s: list[float], gb_s: list[float] | None = None, **labels: Any) -> Case:
    """Return a case of decoding at these speeds, one per repetition, with the memory at gb_s (default: 20)."""
    shape = {"mode": "cached-eager", "format": "bf16", "context": 32, "batch_size": 1} | labels
    samples = {
        "step_s": [[1 / speed] * 3 for speed in tok_s],
        "ttft_s": [0.5] * len(tok_s),
        "bandwidth_gb_s": gb_s or [20.0] * len(tok_s),
        "gemm_flop_s": [1e11] * len(tok_s),
    }
    return Case(shape, {"bytes_per_step": 1e8, "steps": 3.0, "prefill_flop": 1e9}, samples)


def make_record(*cases: Case, utc: str = "2026-01-02T03:04:05Z", commit: str | None = None, **changes: Any) -> Record:
    """Return a valid record of the suite "cache"."""
    run = {"utc": utc, "command": "python -m qwen3fast.bench", "git_commit": commit, "git_dirty": False}
    conditions = {
        name: [value for case in cases for value in case.samples.get(name, [])]
        for name in ("bandwidth_gb_s", "gemm_flop_s")
    }
    checks = {"cached-eager, bf16, batch 1": {"tokens": 12, "exact": 12, "worst_gap": 0.0, "tolerance": 0.03}}
    checks["cached-eager, bf16, batch 1"]["passed"] = True
    fields = {"suite": "cache", "run": run, "environment": dict(ENVIRONMENT), "model": dict(MODEL)}
    fields |= {"cases": list(cases), "checks": checks, "conditions": conditions}
    return Record(**fields | changes)


def new_record() -> Record:
    """Return an empty record."""
    return Record("fake", describe_run(), {}, {"name": "none"})


@dataclass
class FakeClock:
    """A clock that moves only when `wait` is called."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now

    def wait(self, seconds: float) -> None:
        """Advance the clock."""
        self.now += seconds


@dataclass
class FakeWork:
    """Decoding whose 20 steps take `step_s` each.

    slow_runs: run number -> how many times as long its steps take, as when code is compiled. log: gets the name of each
    run.
    """

    name: str
    step_s: float
    clock: FakeClock
    log: list[str] = field(default_factory=list)
    slow_runs: dict[int, float] = field(default_factory=dict)
    runs: int = 0

    def run(self) -> dict[str, Any]:
        """Wait for all steps, each measured with the clock."""
        self.log.append(self.name)
        slowness = self.slow_runs.get(self.runs, 1.0)
        self.runs += 1
        step_s = []
        for _ in range(20):
            started = self.clock()
            self.clock.wait(self.step_s * slowness)
            step_s.append(self.clock() - started)
        return {"step_s": step_s}

    def task(self) -> Task:
        """Return a task for the harness."""
        return Task(Case({"work": self.name, "batch_size": 1}), self.run)


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Probes that tell a speed without taking the time to measure it well, and one run to warm a task up."""
    monkeypatch.setattr(harness, "MAX_WARM_UPS", 1)
    monkeypatch.setitem(probes.PROBE_BYTES, "cpu", 2**20)
    monkeypatch.setattr(probes.GemmProbe, "measure", lambda self, repetitions=3: 1e11)
