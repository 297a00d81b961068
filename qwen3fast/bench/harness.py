"""The order of measurements: warm-up until stable, then all tasks in turns (A B A B), the machine's speed in between.

A busy machine slows down all tasks of a round alike, so ratios within a record hold where absolute figures do not; and
what the machine did meanwhile is told in words. The clock is an argument, so that the harness can be tested on fake
work of known speed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from huggingface_hub.utils import tqdm

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Record

STABLE = 0.05  # two warm-up runs in a row that differ by no more
MOST_WARM_UPS, WARM_UP_S = 4, 3.0
BANDWIDTH_SPREAD = 1.2  # 90th over 10th percentile of the probe's samples
LEAST_SURE = 0.1  # half an interval's width, as a share of the median
STEAL_SHARE = 0.02
MAIN_METRICS = ("decode_tok_s", "tok_s", "seconds", "ttft_s")  # the first that a case has is the one judged

Sample = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A case and how to measure it once: `run` gives each sample's value by name, None for what it could not take."""

    case: Case
    run: Callable[[], Sample]
    warms_up: bool = True


class Harness:
    """Measures tasks into a record. probes: called before and after each task of each round; a sample gets the mean of
    each figure, the record's conditions get all."""

    def __init__(
        self,
        record: Record,
        probes: Iterable[Callable[[], Sample]] = (),
        clock: Callable[[], float] = time.perf_counter,
        is_shown: bool = True,
    ) -> None:
        self._record, self._probes, self._clock, self._is_shown = record, tuple(probes), clock, is_shown
        self._load, self._cpu_ticks = _load_average(), _cpu_ticks()

    def measure(self, tasks: list[Task], repetitions: int, description: str = "measuring") -> None:
        """Warm each task up, then run them all in turns, `repetitions` times. Cases join the record at once, so that
        an interrupted run keeps what it has."""
        # By identity: a case of an earlier call may be equal, with nothing measured yet.
        known = {id(case) for case in self._record.cases}
        self._record.cases += [task.case for task in tasks if id(task.case) not in known]
        bar = tqdm(total=len(tasks) * (repetitions + 1), desc=description, unit="run", disable=not self._is_shown)
        try:
            for task in tasks:
                bar.set_postfix_str(f"warm-up: {task.case.name}")
                if task.warms_up:
                    self.warm_up(task)
                bar.update()
            for _ in range(repetitions):
                for task in tasks:
                    bar.set_postfix_str(task.case.name)
                    before = self._probe()
                    sample = task.run()
                    after = self._probe()
                    task.case.add(sample | {name: (before[name] + after[name]) / 2 for name in before})
                    bar.update()
        finally:
            bar.close()

    def warm_up(self, task: Task) -> int:
        """Run until two runs in a row take about as long, or for long enough. Returns: how many runs it took."""
        started, previous = self._clock(), None
        for count in range(1, MOST_WARM_UPS + 1):
            seconds = _duration(task.run())
            if previous is not None and abs(seconds - previous) <= STABLE * previous:
                return count
            previous = seconds
            if self._clock() - started > WARM_UP_S:
                return count
        return MOST_WARM_UPS

    def finish(self) -> None:
        """Say in the record what made the figures unsure, if anything did."""
        self._record.noise = [*_outside_noise(self._load, self._cpu_ticks), *noise_of(self._record)]

    def _probe(self) -> Sample:
        conditions: Sample = {}
        for probe in self._probes:
            conditions |= probe()
        for name, value in conditions.items():
            self._record.conditions.setdefault(name, []).append(value)
        return conditions


def noise_of(record: Record) -> list[str]:
    """What a record's own samples say against it: memory whose speed changed, and medians that are not well known."""
    reasons = []
    if gb_s := record.conditions.get("bandwidth_gb_s"):
        low, high = np.percentile(gb_s, [10, 90])
        if high > BANDWIDTH_SPREAD * low:
            reasons.append(f"the memory's read bandwidth moved between {low:.3g} and {high:.3g} GB/s during the run")
    unsure = []
    for case in record.cases:
        name = next((name for name in MAIN_METRICS if name in case.metrics), None)
        if name is not None and (spread := case.metrics[name].spread) > LEAST_SURE:
            unsure.append((spread, f"{case.name}: {METRICS[name].title} +-{spread:.0%}"))
    if unsure:
        unsure.sort(reverse=True)
        more = f" and {len(unsure) - 3} more" if len(unsure) > 3 else ""
        reasons.append(f"medians known to no better than {LEAST_SURE:.0%}: {'; '.join(t for _, t in unsure[:3])}{more}")
    return reasons


def _duration(sample: Sample) -> float:
    """What of a sample is compared between warm-up runs: its median step, or else how long it took."""
    if sample.get("step_s"):
        return median(sample["step_s"])
    return next((float(sample[name]) for name in ("seconds", "ttft_s") if sample.get(name) is not None), 0.0)


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _cpu_ticks() -> tuple[int, int] | None:
    """Processor time of the whole machine so far, and how much of it was taken away by others (steal)."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    return (sum(fields[:8]), fields[7]) if len(fields) > 7 else None


def _outside_noise(load: float | None, ticks: tuple[int, int] | None) -> list[str]:
    reasons = []
    if load is not None and load > 0.5 * (os.cpu_count() or 1):
        reasons.append(f"other programs were running when it began (load average {load:.1f})")
    now = _cpu_ticks()
    if ticks is not None and now is not None and now[0] > ticks[0]:
        share = (now[1] - ticks[1]) / (now[0] - ticks[0])
        if share > STEAL_SHARE:
            reasons.append(f"{share:.0%} of the processors' time was taken by other virtual machines")
    return reasons
