"""The choice among forms of the same computation: measured once on each machine, then kept.

The fastest form on one processor can be slow on another. The rule: no form is used where a plainer one is faster on
this machine. docs/how_it_works/kernels.md describes the measurements, and when a choice may change.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch

from qwen3fast.checks import checked_variable
from qwen3fast.kernels.cpu.structures import NEVER
from qwen3fast.kernels.forms_file import Choice, keep, kept, machine

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

VARIABLE = "QWEN3FAST_FORMS"
MEASURED, FIRST = "measured", "first"
MAX_ROUNDS, MIN_ROUNDS, MAX_TRIES = 5, 3, 12
CASE_S = 0.05  # of one case; MIN_ROUNDS are measured even if they take longer
PART_S = 0.3  # of all cases of a part; those left over are measured when the next engine is built
GAIN = 1.05  # another form displaces the first only if it is this much faster in every round
CLEAR, CLEAR_ROUNDS = 1.5, 2  # so much slower than another in so many rounds, a form is not measured further

BUSY = "the machine was too busy to measure"

_lock = threading.RLock()
_used: dict[str, Choice] = {}  # by key: what one engine of this process uses, all engines built later use, too


class FormCase(NamedTuple):
    """Work that several forms can do.

    what: the computation, such as "prefill attention". key: its sizes in words. names: of the forms; the first is used
    unless another is clearly faster. calls: returns a function of each form that does the work. sizes: those that the
    choice depends on in an engine.
    """

    what: str
    key: str
    names: tuple[str, ...]
    calls: Callable[[], Mapping[str, Callable[[], Any]]]
    sizes: tuple[int, ...] = ()


def is_pinned() -> bool:
    """Return whether QWEN3FAST_FORMS=first asks for the first form everywhere.

    Raises: ValueError for a value other than "first", "measured" and nothing.
    """
    return checked_variable(VARIABLE) == FIRST


def choose(case: FormCase, may_measure: bool = True, is_first: bool = False) -> Choice:
    """Return the form to use for a case; measurements of this and earlier processes are kept.

    may_measure: False returns the first form where nothing is known. is_first: take the first form in any case.
    Raises: ValueError as `is_pinned`.
    """
    first = case.names[0]
    if is_first or is_pinned():
        return Choice(first, "pinned")
    if len(case.names) == 1:
        return Choice(first, "the only form that serves")
    key = machine_key(case)
    with _lock:
        if key not in _used:
            known = kept(key)
            if known is not None and set(known.seconds) == set(case.names):
                _used[key] = known
            elif not may_measure:
                return Choice(first, "not measured yet")
            else:
                choice = measure_and_keep(case)
                if not choice.seconds:
                    return choice
                _used[key] = choice
        return _used[key]


def measure_and_keep(case: FormCase) -> Choice:
    """Measure a case and write the result into the cache folder; engines that are built later use it.

    Nothing is written if the machine was too busy; the first form is returned then, without times.
    """
    first = case.names[0]
    with torch.device("cpu"):  # whatever the application's default device is
        calls = case.calls()
    rounds = measure(calls)
    if len(rounds[first]) < CLEAR_ROUNDS:
        return Choice(first, BUSY)
    choice = Choice(winner(rounds), "measured now", {name: median(times) for name, times in rounds.items()})
    keep(machine_key(case), choice)
    logger.info("%s (%s): %s", case.what, case.key, choice)
    return choice


def interruptions() -> int:
    """Return how often other work has taken a processor away from this process's threads, where the system tells."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


def measure(
    calls: Mapping[str, Callable[[], Any]],
    budget_s: float = CASE_S,
    clock: Callable[[], float] = time.perf_counter,
    interrupted: Callable[[], int] = interruptions,
) -> dict[str, list[float]]:
    """Return the seconds of each form in each round; they take turns, after a first call that does not count.

    Rounds that other work interrupted do not count either: threads that wait for each other then take many times as
    long. A form ends early when it is clearly slower than another; all end after MAX_ROUNDS, after MIN_ROUNDS once the
    budget is spent, or when one form is left; on a busy machine after MAX_TRIES, with fewer rounds or none.
    """
    started = clock()
    for call in calls.values():
        call()
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    left = list(calls)
    number = 0
    for tried in range(1, MAX_TRIES + 1):
        before, seconds = interrupted(), {}
        for name in left:
            began = clock()
            calls[name]()
            seconds[name] = clock() - began
        if interrupted() == before:
            number += 1
            for name, s in seconds.items():
                rounds[name].append(s)
        is_spent = clock() - started > budget_s and tried >= MIN_ROUNDS
        if number == MAX_ROUNDS or (is_spent and (number >= MIN_ROUNDS or tried >= 2 * MIN_ROUNDS)):
            break
        if number >= CLEAR_ROUNDS:
            left = [name for name in left if not any(_beats(rounds[other], rounds[name], CLEAR) for other in left)]
        if len(left) == 1:
            break
    return rounds


def winner(rounds: Mapping[str, list[float]]) -> str:
    """Return the first form, or the fastest one if any was faster than the first in every round.

    By GAIN, or by CLEAR where they share fewer than MIN_ROUNDS. Rounds are in order; forms that ended early have fewer.
    """
    first, times = next(iter(rounds.items()))
    if not any(_displaces(others, times) for others in rounds.values()):
        return first
    most = max(map(len, rounds.values()))
    return min((name for name in rounds if len(rounds[name]) == most), key=lambda name: median(rounds[name]))


def _displaces(times: list[float], first: list[float]) -> bool:
    shared = min(len(times), len(first))
    gain = GAIN if shared >= MIN_ROUNDS else CLEAR
    return shared >= CLEAR_ROUNDS and _beats(times[:shared], first[:shared], gain)


def _beats(times: list[float], others: list[float], gain: float) -> bool:
    return all(a * gain < b for a, b in zip(times, others, strict=True))


def used_from(choices: Iterable[tuple[int, str]], *forms: str) -> int:
    """Return the smallest measured size from which one of these forms was chosen at that and all larger ones, or NEVER.

    choices: each measured size and the form that was chosen there, sizes ascending.
    """
    least = NEVER
    for size, name in reversed(list(choices)):
        if name not in forms:
            break
        least = size
    return least


def machine_key(case: FormCase) -> str:
    """Return the case and what its times depend on: processor, threads, versions of PyTorch, qwen3fast and its C++."""
    return f"{case.what} | {case.key} | {machine()}"
