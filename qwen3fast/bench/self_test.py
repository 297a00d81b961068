"""The `self-test` command: the harness measures work of known speed, which waits, within a few percent.

tests/bench holds the harness to exact figures, on a clock of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from qwen3fast.bench.environment import describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task
from qwen3fast.bench.metrics import per_repetition
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.statistics import ratio
from qwen3fast.bench.table import as_text

STEP_S = {"A": 0.005, "B": 0.010}
STEPS, ROUNDS = 20, 5
TOLERANCE = 0.05  # a busy machine takes the processor away in the middle of a step
RATIO_TOLERANCE = 0.01


@dataclass(frozen=True)
class Finding:
    """An expected and a found value."""

    what: str
    expected: str
    found: str
    is_right: bool


def check_in_real_time() -> list[Finding]:
    """Return the milliseconds per step of works A and B, and how many times as fast A is as B."""
    record = Record("self-test", describe_run(), {}, {"name": "none"})
    harness = Harness(record, clock=time.perf_counter, is_shown=False)
    tasks = [Task(Case({"work": name, "batch_size": 1}), partial(_take_steps, STEP_S[name])) for name in STEP_S]
    harness.measure(tasks, ROUNDS)
    findings = []
    for case in record.cases:
        expected, found = STEP_S[str(case.labels["work"])] * 1e3, case.metrics["step_ms"].median
        is_right = abs(found - expected) <= TOLERANCE * expected
        findings.append(Finding(f"{case.labels['work']}, ms per step", f"{expected:g}", f"{found:.4g}", is_right))
    a, b = (per_repetition(c.labels, c.facts, c.samples)["decode_tok_s"] for c in record.cases)
    e = ratio(a, b)
    low, high = (e.median if bound is None else bound for bound in (e.low, e.high))
    is_right = low * (1 - RATIO_TOLERANCE) <= 2 <= high * (1 + RATIO_TOLERANCE)
    return [*findings, Finding("A is times as fast as B", "2", f"{e.median:.4g} ({low:.4g} to {high:.4g})", is_right)]


def _take_steps(step_s: float) -> Measurement:
    times = [time.perf_counter()]
    for _ in range(STEPS):
        wait(step_s)
        times.append(time.perf_counter())
    return {"step_s": [after - before for before, after in pairwise(times)]}


def wait(seconds: float) -> None:
    """Wait exactly this long: asleep first, which a busy machine rewards with the processor in time, awake for the last
    millisecond, since a sleep's end is not exact."""
    until = time.perf_counter() + seconds
    time.sleep(max(0.0, seconds - 0.001))
    while time.perf_counter() < until:
        pass


def run(args: argparse.Namespace) -> int:
    """Print all findings. Returns: the exit status, 1 if a figure is wrong."""
    findings = check_in_real_time()
    rows = [["what", "expected", "found", "verdict"]]
    rows += [[f.what, f.expected, f.found, "ok" if f.is_right else "WRONG"] for f in findings]
    print(as_text(rows, left=1))
    wrong = sum(not f.is_right for f in findings)
    if wrong:
        print(f"{wrong} of {len(findings)} are wrong; other programs may be why", file=sys.stderr)
    return 1 if wrong else 0
