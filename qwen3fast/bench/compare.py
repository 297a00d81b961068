"""Comparison of two records: changes beyond noise.

A change counts only if it holds twice, each time with its whole 95% interval beyond the threshold: as measured, and
relative to the machine's own speed, which a record samples beside each repetition. If decoding is 20% slower and the
memory's bandwidth fell by 22%, that is no loss. The yardstick of decoding is the limit of a step (`limit_tok_s`, by
OLD's bytes: a step that reads less still counts as faster); of prefill, the rate of the matrix product. A metric that
either may limit must hold against both.

Where noise is larger than the threshold, chance alone makes a case look worse about once in 20 times with three
repetitions on each side, once in 50 with five (simulated, normal noise). Fewer than three are not judged. In a record
of many cases, a single worse one may be chance: measure again.
Repetitions of one run share circumstances that no interval within a run shows. If a record says that it is noisy, timed
metrics must change by more than three times the threshold, and by more than the machine's own speed varied within a run
(90th over 10th percentile of its samples).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from qwen3fast.bench.metrics import CONDITIONS, METRICS, per_repetition
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.bench.statistics import Estimate, ratio
from qwen3fast.bench.verdict import EXACT, UNJUDGED, WORSE, judge, judge_zero

LIMIT = "limit_tok_s"
YARDSTICK = {"decode_tok_s": LIMIT, "step_ms": LIMIT, "effective_gb_s": LIMIT, "prefill_tok_s": "gemm_flop_s"}
YARDSTICK |= {"prefill_flop_s": "gemm_flop_s"}
NO_YARDSTICK = EXACT | {"peak_memory_bytes", "share_of_bandwidth", "prefill_share_of_gemm", LIMIT}
UNTIMED = EXACT | {"peak_memory_bytes"}
NOISY_THRESHOLDS = 3.0
# By default, single values, shares, and metrics that equal another metric of the case are not judged.
NOT_BY_DEFAULT = {"share_of_bandwidth", "prefill_share_of_gemm", LIMIT, "step_p99_ms"}
SAYS_THE_SAME = {"step_ms": "decode_tok_s", "effective_gb_s": "decode_tok_s", "ttft_s": "prefill_tok_s"}
SAYS_THE_SAME |= {"prefill_flop_s": "prefill_tok_s", "seconds": "tok_s"}
WORK = ("steps", "tokens", "requests")  # facts on how much was done in a repetition


@dataclass(frozen=True)
class Change:
    """The change of one metric of one case.

    ratio: new over old (None if one is 0). relative: the same over the machine's own change, by yardstick.
    """

    labels: dict[str, Label]
    metric: str
    old: float
    new: float
    ratio: Estimate | None
    relative: dict[str, Estimate]
    verdict: str


@dataclass
class Comparison:
    """All changes, cases of only one record, the machine's own change, the thresholds, and notes."""

    changes: list[Change] = field(default_factory=list)
    only_in_old: list[str] = field(default_factory=list)
    only_in_new: list[str] = field(default_factory=list)
    machine: dict[str, Estimate] = field(default_factory=dict)
    threshold: float = 0.0
    timed_threshold: float = 0.0  # a greater one if a record is noisy
    failed_checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, *verdicts: str) -> list[Change]:
        """Return the changes with one of these verdicts."""
        return [change for change in self.changes if change.verdict in verdicts]

    @property
    def status(self) -> int:
        """The exit status: 0, 1 (something is worse, or NEW has wrong tokens), 2 (nothing could be judged)."""
        if self.of(WORSE) or self.failed_checks:
            return 1
        return 0 if len(self.of(UNJUDGED)) < len(self.changes) else 2


def differences(old: Record, new: Record) -> list[str]:
    """Return the reasons why two records cannot be compared: other suites, machines or models."""
    pairs: list[tuple[str, Any, Any]] = [("suite", old.suite, new.suite)]
    for name in ("device", "gpu", "cpu", "cpu_count", "threads"):
        pairs.append((name, old.environment.get(name), new.environment.get(name)))
    for name in ("name", "dtype", "parameters"):
        pairs.append((f"model {name}", old.model.get(name), new.model.get(name)))
    return [f"{what} {a!r} and {b!r}" for what, a, b in pairs if a != b]


def compare_records(
    old: Record, new: Record, metrics: tuple[str, ...] = (), threshold: float = 0.03, force: bool = False
) -> Comparison:
    """Judge every case that both have. metrics: to judge; by default the main ones of each case.

    Raises: ValueError for a bad threshold, for records that cannot be compared (unless `force`) or share nothing.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"the threshold must be at least 0 and less than 1, got {threshold}")
    apart = differences(old, new)
    if apart and not force:
        raise ValueError(f"these records cannot be compared: {'; '.join(apart)}; --force compares them anyway")
    before, after = _by_labels(old, "OLD"), _by_labels(new, "NEW")
    comparison = Comparison(notes=[f"different {text}" for text in apart] + _notes(old, new), threshold=threshold)
    comparison.timed_threshold = timed = _timed_threshold(old, new, threshold)
    comparison.only_in_old = [case.name for key, case in before.items() if key not in after]
    comparison.only_in_new = [case.name for key, case in after.items() if key not in before]
    comparison.failed_checks = [name for name, check in new.checks.items() if not check["passed"]]
    for name in CONDITIONS:
        if old.conditions.get(name) and new.conditions.get(name):
            comparison.machine[name] = ratio(new.conditions[name], old.conditions[name])
    shared = [(case, after[key]) for key, case in before.items() if key in after]
    for a, b in shared:
        comparison.changes += _changes(a, b, metrics, threshold, timed)
        comparison.notes += _other_work(a, b)
    if not comparison.changes and not comparison.failed_checks:
        asked = ", ".join(metrics) or "no metric"
        raise ValueError(f"nothing to compare: of {len(shared)} cases in common, none has {asked} in both records")
    return comparison


def _by_labels(record: Record, where: str) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for case in record.cases:
        if case.samples and cases.setdefault(json.dumps(case.labels, sort_keys=True), case) is not case:
            raise ValueError(f"{where} has two cases with the same labels: {case.name}")
    return cases


def _notes(old: Record, new: Record) -> list[str]:
    pairs = [(name, old.environment.get(name), new.environment.get(name)) for name in ("torch", "python", "platform")]
    notes = [f"{name} was {a}, is {b}" for name, a, b in pairs if a != b]
    for which, record in (("OLD", old), ("NEW", new)):
        notes += [f"{which} is noisy: {reason}" for reason in record.noise]
        if record.interrupted:
            notes.append(f"{which} was interrupted")
        if record.run.get("git_dirty"):
            notes.append(f"{which} was measured with uncommitted changes")
    return notes


def _other_work(old: Case, new: Case) -> list[str]:
    pairs = [(name, old.facts.get(name), new.facts.get(name)) for name in WORK]
    return [f"{old.name}: {a:g} {name} before, {b:g} now" for name, a, b in pairs if a and b and a != b]


def _timed_threshold(old: Record, new: Record, threshold: float) -> float:
    """Return the threshold, or a greater one if a record is noisy."""
    noisy = [record for record in (old, new) if record.noise]
    samples = [record.conditions[c] for record in noisy for c in CONDITIONS if record.conditions.get(c)]
    spreads = [float(high / low) - 1 for low, high in (np.percentile(values, [10, 90]) for values in samples)]
    return max(threshold, NOISY_THRESHOLDS * threshold, *spreads) if noisy else threshold


def _changes(old: Case, new: Case, metrics: tuple[str, ...], threshold: float, timed: float) -> list[Change]:
    before, after = (per_repetition(case.labels, case.facts, case.samples) for case in (old, new))
    speeds = _machine_speeds(old, new)
    changes = []
    for name in before.keys() & after.keys():
        if name not in metrics if metrics else not _matters(name, before):
            continue
        medians = median(before[name]), median(after[name])
        if min(*before[name], *after[name]) <= 0:
            changes.append(Change(old.labels, name, *medians, None, {}, judge_zero(name, *medians)))
            continue
        change, relative = ratio(after[name], before[name]), {}
        for yardstick in _yardsticks(name, speeds):
            a, b = speeds[yardstick]
            if len(a) == len(before[name]) and len(b) == len(after[name]):
                relative[yardstick] = ratio(_over(name, after[name], b), _over(name, before[name], a))
        verdict = judge(name, change, relative.values(), threshold if name in UNTIMED else timed)
        changes.append(Change(old.labels, name, *medians, change, relative, verdict))
    order = list(METRICS)
    return sorted(changes, key=lambda change: order.index(change.metric))


def _matters(name: str, values: dict[str, list[float]]) -> bool:
    return name not in NOT_BY_DEFAULT and SAYS_THE_SAME.get(name) not in values


def _machine_speeds(old: Case, new: Case) -> dict[str, tuple[list[float], list[float]]]:
    """Return the machine's own speed beside each repetition, old and new; the limit is always of OLD's step."""
    pairs = {name: (old.samples.get(name, []), new.samples.get(name, [])) for name in CONDITIONS}
    before, after = (per_repetition(old.labels, old.facts, case.samples) for case in (old, new))
    pairs[LIMIT] = (before.get(LIMIT, []), after.get(LIMIT, []))
    return {name: pair for name, pair in pairs.items() if all(pair)}


def _yardsticks(name: str, speeds: dict[str, tuple[list[float], list[float]]]) -> tuple[str, ...]:
    if name in NO_YARDSTICK:
        return ()
    if YARDSTICK.get(name) in speeds:
        return (YARDSTICK[name],)
    return tuple(c for c in CONDITIONS if c in speeds)


def _over(name: str, values: list[float], speeds: list[float]) -> list[float]:
    """Return values as on a machine of speed 1: a rate grows with the speed, a time shrinks."""
    pairs = zip(values, speeds, strict=True)
    return [v / s if METRICS[name].is_higher_better else v * s for v, s in pairs]
