"""The `self-test` command: the harness on fake work of known speed.

First on a fake clock, where every figure is exact: the order of runs, the end of the warm-up, medians despite an
outlier, memory that slows down. Then in real time, by waiting, where figures must be right within a few percent.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwen3fast.bench.environment import describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task
from qwen3fast.bench.metrics import per_repetition
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.statistics import ratio
from qwen3fast.bench.table import as_text

STEP_S = {"A": 0.005, "B": 0.010}
STEPS, ROUNDS = 20, 5
REAL_TOLERANCE = 0.05  # a busy machine takes the processor away in the middle of a step


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
    """Decoding whose steps take `step_s`.

    slow_runs: run number -> how many times as long its steps take, as when code is compiled. log: gets the name of each
    run.
    """

    name: str
    step_s: float
    clock: Callable[[], float]
    wait: Callable[[float], None]
    log: list[str] = field(default_factory=list)
    slow_runs: dict[int, float] = field(default_factory=dict)
    runs: int = 0

    def run(self) -> Measurement:
        """Wait for STEPS steps, each measured with the clock."""
        self.log.append(self.name)
        slowness = self.slow_runs.get(self.runs, 1.0)
        self.runs += 1
        step_s = []
        for _ in range(STEPS):
            started = self.clock()
            self.wait(self.step_s * slowness)
            step_s.append(self.clock() - started)
        return {"step_s": step_s}

    def task(self) -> Task:
        """Return a task for the harness."""
        return Task(Case({"work": self.name, "batch_size": 1}), self.run)


@dataclass(frozen=True)
class Finding:
    """An expected and a found value."""

    what: str
    expected: str
    found: str
    is_right: bool


def new_record() -> Record:
    """Return an empty record."""
    return Record("self-test", describe_run(), {}, {"name": "none"})


def measure(works: Sequence[FakeWork], clock: Callable[[], float], gb_s: Sequence[float] = ()) -> Record:
    """Run the harness on fake work. gb_s: the readings of a memory probe, call by call; the last is repeated."""
    left = list(gb_s)
    probes = [lambda: {"bandwidth_gb_s": left.pop(0) if len(left) > 1 else left[0]}] if left else []
    record = new_record()
    harness = Harness(record, probes, clock, is_shown=False)
    harness.measure([work.task() for work in works], ROUNDS)
    harness.finish()
    return record


def speeds(record: Record) -> list[list[float]]:
    """Return the tokens/s of each repetition, per case."""
    return [per_repetition(c.labels, c.facts, c.samples)["decode_tok_s"] for c in record.cases]


def check_on_fake_clock() -> list[Finding]:
    """Check exact figures: any deviation is a fault of the harness."""
    clock = FakeClock()
    log: list[str] = []
    # A's first run takes four times as long and its second twice; in a later round something else takes the processor.
    a = FakeWork("A", STEP_S["A"], clock, clock.wait, log, {0: 4.0, 1: 2.0, 6: 10.0})
    b = FakeWork("B", STEP_S["B"], clock, clock.wait, log)
    # A round probes four times: from the third round on, the memory is half as fast.
    record = measure([a, b], clock, [20.0] * 8 + [10.0])
    order = "".join(log)
    settled = 4  # 4x, 2x, 1x, and 1x again
    findings = [
        _equal("runs until A is warm, B is warm", (settled, 2), (order.index("B"), order[:6].count("B"))),
        _equal("order of rounds", "AB" * ROUNDS, order[settled + 2 :]),
    ]
    for name, case in zip("AB", record.cases, strict=True):
        findings.append(_near(f"{name}, ms per step", STEP_S[name] * 1e3, case.metrics["step_ms"].median, 1e-9))
    findings.append(_near("A, slowest ms", 50.0, record.cases[0].metrics["step_p99_ms"].median, 1e-9))
    findings.append(_ratio_is_two(record, 1e-9))
    told = any("bandwidth moved between 10 and 20 GB/s" in reason for reason in record.noise)
    findings.append(Finding("slower memory is reported", "yes", "yes" if told else "no", told))
    return findings


def check_in_real_time() -> list[Finding]:
    """Check figures within REAL_TOLERANCE, and their ratio within one percent."""
    works = [FakeWork(name, step_s, time.perf_counter, wait) for name, step_s in STEP_S.items()]
    record = measure(works, time.perf_counter)
    findings = [
        _near(f"{name}, ms per step", STEP_S[name] * 1e3, case.metrics["step_ms"].median, REAL_TOLERANCE)
        for name, case in zip("AB", record.cases, strict=True)
    ]
    return [*findings, _ratio_is_two(record, 0.01)]


def wait(seconds: float) -> None:
    """Wait exactly this long: asleep first, which a busy machine rewards with the processor in time, awake for the last
    millisecond, since a sleep's end is not exact."""
    until = time.perf_counter() + seconds
    time.sleep(max(0.0, seconds - 0.001))
    while time.perf_counter() < until:
        pass


def run(args: argparse.Namespace) -> int:
    """Print all findings. Returns: the exit status, 1 if a figure is wrong."""
    findings = [("fake clock", f) for f in check_on_fake_clock()] + [("real time", f) for f in check_in_real_time()]
    rows = [["clock", "what", "expected", "found", "verdict"]]
    rows += [[clock, f.what, f.expected, f.found, "ok" if f.is_right else "WRONG"] for clock, f in findings]
    print(as_text(rows, left=2))
    wrong = sum(not f.is_right for _, f in findings)
    if wrong:
        print(f"{wrong} of {len(findings)} are wrong; in real time, other programs may be why", file=sys.stderr)
    return 1 if wrong else 0


def _equal(what: str, expected: object, found: object) -> Finding:
    return Finding(what, str(expected), str(found), expected == found)


def _near(what: str, expected: float, found: float, tolerance: float) -> Finding:
    return Finding(what, f"{expected:g}", f"{found:.4g}", abs(found - expected) <= tolerance * expected)


def _ratio_is_two(record: Record, tolerance: float) -> Finding:
    """Check that the interval of A's speed over B's, widened by the tolerance, contains 2."""
    a, b = speeds(record)
    e = ratio(a, b)
    low, high = (e.median if bound is None else bound for bound in (e.low, e.high))
    is_right = low * (1 - tolerance) <= 2 <= high * (1 + tolerance)
    return Finding("A is times as fast as B", "2", f"{e.median:.4g} ({low:.4g} to {high:.4g})", is_right)
