"""The order of measurements: warm-up until stable, then all tasks in turns (A B A B), the machine's speed in between.

A busy machine slows down all tasks of a round, so ratios within a record hold where absolute figures do not. The clock
is an argument: the harness is tested on fake work of known speed.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from qwen3fast.bench.noise import NoiseWatch, noise_of
from qwen3fast.bench.progress import Progress
from qwen3fast.bench.record import Case, Record

STABLE = 0.05  # largest difference of two consecutive warm-up runs that counts as stable
MAX_WARM_UPS, WARM_UP_S = 4, 3.0

Measurement = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A case and how to measure it once: `run` returns each sample's value by name, None for an unavailable one.

    run: returns None if nothing is left to measure, for example after an engine has crashed.
    expected_s: estimated seconds of a run, for the progress bar and for runs with a time limit.
    """

    case: Case
    run: Callable[[], Measurement | None]
    warms_up: bool = True
    expected_s: float = 1.0


@dataclass(frozen=True)
class Group:
    """Tasks that take turns."""

    description: str
    tasks: Sequence[Task]

    @property
    def round_s(self) -> float:
        """Expected seconds of one round."""
        return sum(task.expected_s for task in self.tasks)

    @property
    def first_s(self) -> float:
        """Expected seconds of the first round, with a warm-up run of each task that has one."""
        return self.round_s + sum(task.expected_s for task in self.tasks if task.warms_up)


class Harness:
    """Measures tasks into a record.

    probes: called before and after each run; a sample gets the mean of each figure, the record's conditions get all.
    rng: shuffles the tasks of every round; None keeps their order.
    """

    def __init__(
        self,
        record: Record,
        probes: Iterable[Callable[[], Measurement]] = (),
        clock: Callable[[], float] = time.perf_counter,
        is_shown: bool = True,
        rng: random.Random | None = None,
    ) -> None:
        self.progress = Progress(is_shown, clock=clock)
        self._record, self._probes, self._clock, self._rng = record, tuple(probes), clock, rng
        self._noise = NoiseWatch()

    def measure(self, tasks: Sequence[Task], repetitions: int, description: str = "measuring") -> None:
        """Warm each task up, then run them all in turns, `repetitions` times."""
        self.run([Group(description, tasks)], repetitions)

    def run(self, groups: Sequence[Group], repetitions: int) -> None:
        """Measure one group after the other. Cases join the record at once: an interrupted run keeps its samples."""
        self._add_cases(groups)
        self.progress.expect(sum(g.first_s + (repetitions - 1) * g.round_s for g in groups))
        for number, group in enumerate(groups, 1):
            title = f"{group.description} ({number} of {len(groups)})" if len(groups) > 1 else group.description
            for task in group.tasks:
                if task.warms_up:
                    self.progress.show(f"{title}, warm-up: {task.case.name}")
                    self.warm_up(task)
                    self.progress.done += task.expected_s
            for i in range(repetitions):
                self._round(group, f"{title}, round {i + 1} of {repetitions}")
        self.progress.close()

    def run_until(self, groups: Sequence[Group], repetitions: int, end: float) -> list[Group]:
        """Measure rounds over all groups, the cheapest first, as far as they fit before `end` on the clock.

        Every task is warmed up by one run. Returns: the groups for which there was no time.
        """
        left, costs, pace = list(groups), dict[int, float](), 1.0
        while left and (not costs or self._clock() + pace * left[0].first_s <= end):
            further = (repetitions - 1) * (sum(costs.values()) + pace * sum(g.round_s for g in left))
            self._limit_progress(pace * sum(g.first_s for g in left) + further, end)
            group, number = left.pop(0), len(costs)
            costs[number] = self._first_round(group, f"{group.description} ({number + 1} of {len(groups)})")
            pace = costs[number] / max(1e-9, group.round_s)  # a warm-up may also capture graphs, once
        for i in range(1, repetitions):
            for number, cost in costs.items():
                if self._clock() + cost > end:
                    break
                rest = sum(costs[n] for n in costs if n >= number) + (repetitions - i - 1) * sum(costs.values())
                self._limit_progress(rest, end)
                self._round(groups[number], f"{groups[number].description}, round {i + 1} of {repetitions}", True)
        self.progress.close()
        return left

    def _first_round(self, group: Group, title: str) -> float:
        """Warm up and measure once. Returns: seconds of the round, without the warm-up."""
        self._add_cases([group])
        for task in group.tasks:
            if task.warms_up:
                self.progress.show(f"{title}, warm-up: {task.case.name}")
                started = self._clock()
                task.run()
                self.progress.done += self._clock() - started
        warm = self._clock()
        self._round(group, f"{title}, round 1", True)
        return self._clock() - warm

    def warm_up(self, task: Task) -> int:
        """Run until two consecutive runs take about as long, or for long enough. Returns: the number of runs."""
        started, previous = self._clock(), None
        for count in range(1, MAX_WARM_UPS + 1):
            seconds = _duration(task.run())
            if previous is not None and abs(seconds - previous) <= STABLE * previous:
                return count
            previous = seconds
            if self._clock() - started > WARM_UP_S:
                return count
        return MAX_WARM_UPS

    def finish(self) -> None:
        """End the progress bar, and add reasons to doubt the figures to the record."""
        self.progress.close()
        self._record.noise = [*self._noise.reasons(), *noise_of(self._record)]

    def _add_cases(self, groups: Iterable[Group]) -> None:
        # By identity: a case of an earlier call may be equal, with nothing measured yet.
        known = {id(case) for case in self._record.cases}
        cases = [task.case for group in groups for task in group.tasks]
        self._record.cases += [case for case in cases if id(case) not in known]

    def _round(self, group: Group, title: str, counts_seconds: bool = False) -> None:
        """Run each task once. counts_seconds: progress counts the time it took instead of the expected one."""
        tasks = list(group.tasks)
        if self._rng is not None:
            self._rng.shuffle(tasks)
        for task in tasks:
            self.progress.show(f"{title}: {task.case.name}")
            started, before = self._clock(), self._probe()
            sample = task.run()
            if sample is not None:
                after = self._probe()
                task.case.add(sample | {name: (before[name] + after[name]) / 2 for name in before})
            self.progress.done += self._clock() - started if counts_seconds else task.expected_s

    def _limit_progress(self, work: float, end: float) -> None:
        self.progress.total = self.progress.done + max(0.0, min(work, end - self._clock()))

    def _probe(self) -> Measurement:
        conditions: Measurement = {}
        for probe in self._probes:
            conditions |= probe()
        for name, value in conditions.items():
            self._record.conditions.setdefault(name, []).append(value)
        return conditions


@contextmanager
def interruptible(record: Record) -> Iterator[None]:
    """Keep the measurements when Ctrl-C or SIGTERM ends the run: the block ends, and the record says so."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        previous = None
    try:
        yield
    except KeyboardInterrupt:
        record.interrupted = True
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _duration(sample: Measurement | None) -> float:
    """Return the time to compare warm-up runs by: the median step, otherwise the whole run."""
    if sample is None:
        return 0.0
    if sample.get("step_s"):
        return float(median(sample["step_s"]))
    return next((float(sample[name]) for name in ("seconds", "ttft_s") if sample.get(name) is not None), 0.0)
