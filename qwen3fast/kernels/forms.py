"""The choice among forms of the same computation: measured once on each machine, then kept.

A form that wins on one processor loses on another: attention in C++ takes a quarter of the time of PyTorch's on AMD
Zen 5, and three times its time on Intel processors with AMX. The rule: no form is used where a plainer one is faster on
the machine at hand. docs/how_it_works/kernels.md describes what is measured, and when a choice may change.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from qwen3fast._version import __version__
from qwen3fast.kernels.cpu.library import source_key
from qwen3fast.kernels.cpu.structures import NEVER

logger = logging.getLogger(__name__)

VARIABLE = "QWEN3FAST_FORMS"
MEASURED, FIRST = "measured", "first"
MAX_ROUNDS, MIN_ROUNDS = 5, 3
CASE_S = 0.05  # of one case; MIN_ROUNDS are measured even if they take longer
PART_S = 0.3  # of all cases of a part; those left over are measured when the next engine is built
GAIN = 1.05  # another form displaces the first only if it is this much faster in every round
CLEAR, CLEAR_ROUNDS = 1.5, 2  # the first form stays if it was so much faster in so many rounds

_lock = threading.RLock()
_used: dict[str, Choice] = {}  # by key: what one engine of this process uses, all engines built later use, too


@dataclass(frozen=True)
class Choice:
    """The form that was chosen for some work. seconds: each form's median time for it; empty if none was measured."""

    name: str
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason}{': ' if self.seconds else ''}{self.times})"

    @property
    def times(self) -> str:
        """The times in words: "C++ 0.31 ms, SDPA 0.98 ms"."""
        return ", ".join(f"{name} {s * 1e3:.3g} ms" for name, s in self.seconds.items())


class Case(NamedTuple):
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
    value = os.environ.get(VARIABLE) or MEASURED
    if value not in (FIRST, MEASURED):
        raise ValueError(f"{VARIABLE} must be {FIRST!r}, {MEASURED!r} or unset, got {value!r}")
    return value == FIRST


def choose(case: Case, may_measure: bool = True, is_first: bool = False) -> Choice:
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
                _used[key] = measure_and_keep(case)
        return _used[key]


def measure_and_keep(case: Case) -> Choice:
    """Measure a case and write the result into the cache folder; engines that are built later use it."""
    rounds = measure(case.calls())
    choice = Choice(winner(rounds), "measured now", {name: median(times) for name, times in rounds.items()})
    _keep(machine_key(case), choice)
    logger.info("%s (%s): %s", case.what, case.key, choice)
    return choice


def measure(
    calls: Mapping[str, Callable[[], Any]],
    budget_s: float = CASE_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each form in each round; they take turns, after a first call that does not count.

    It ends after MAX_ROUNDS, after MIN_ROUNDS once the budget is spent, or when the first form is clearly the fastest.
    """
    started = clock()
    for call in calls.values():
        call()
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1, MAX_ROUNDS + 1):
        for name, call in calls.items():
            began = clock()
            call()
            rounds[name].append(clock() - began)
        is_spent = number >= MIN_ROUNDS and clock() - started > budget_s
        if is_spent or (number >= CLEAR_ROUNDS and _is_first_clear(rounds)):
            break
    return rounds


def winner(rounds: Mapping[str, list[float]]) -> str:
    """Return the first form, or the fastest of those that were faster than it in every round, by GAIN."""
    first, times = next(iter(rounds.items()))
    better = [name for name in rounds if _beats(rounds[name], times, GAIN)]
    return min(better, key=lambda name: median(rounds[name]), default=first)


def _beats(times: list[float], others: list[float], gain: float) -> bool:
    return all(a * gain <= b for a, b in zip(times, others, strict=True))


def _is_first_clear(rounds: Mapping[str, list[float]]) -> bool:
    first, *others = rounds.values()
    return all(_beats(first, times, CLEAR) for times in others)


def used_from(choices: Iterable[tuple[int, str]], form: str) -> int:
    """Return the smallest measured size from which a form was chosen at that and all larger ones, or NEVER.

    choices: each measured size and the form that was chosen there, sizes ascending.
    """
    least = NEVER
    for size, name in reversed(list(choices)):
        if name != form:
            break
        least = size
    return least


# ------------------------------------------------------------------------------------------------ the file


def machine_key(case: Case) -> str:
    """Return the case and what its times depend on: processor, threads, versions of PyTorch, qwen3fast and its C++."""
    return f"{case.what} | {case.key} | {machine()}"


def machine() -> str:
    """Return processor, threads and versions."""
    threads = torch.get_num_threads()
    return f"{processor()} | {threads} threads | torch {torch.__version__} | qwen3fast {__version__} {source_key()}"


@cache
def processor() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        named = {name.strip(): value.strip() for name, value in fields.items()}
        return f"{named['model name']} ({named.get('cpu family', '?')}/{named.get('model', '?')})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def kept(key: str) -> Choice | None:
    """Return a measurement from the cache folder; None if there is none, or it is damaged."""
    return _as_choice(_read().get(key))


def _as_choice(entry: Any) -> Choice | None:
    if not isinstance(entry, dict):
        return None
    name, seconds = entry.get("form"), entry.get("seconds")
    if not isinstance(name, str) or not isinstance(seconds, dict) or name not in seconds:
        return None
    if not all(isinstance(s, float) and 0 < s < math.inf for s in seconds.values()):
        return None
    return Choice(name, "measured earlier", seconds)


def all_kept() -> dict[tuple[str, str], Choice]:
    """Return what was measured on this machine with these versions, by computation and sizes."""
    end, found = f" | {machine()}", {}
    for key, entry in _read().items():
        choice = _as_choice(entry) if key.endswith(end) else None
        if choice is not None:
            what, _, sizes = key.removesuffix(end).partition(" | ")
            found[what, sizes] = choice
    return found


def forms_file() -> Path:
    """Return where measurements are kept: forms.json in `$XDG_CACHE_HOME/qwen3fast`, or `~/.cache/qwen3fast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3fast" / "forms.json"


def _read() -> dict[str, Any]:
    """Return what is kept; nothing if the file is missing or damaged: it can be measured again."""
    try:
        value = json.loads(forms_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    return value if isinstance(value, dict) else {}


def _keep(key: str, choice: Choice) -> None:
    """Add a measurement to the file, which another process may read or replace at any time."""
    try:
        path = forms_file()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps({**_read(), key: {"form": choice.name, "seconds": choice.seconds}}, indent=1)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, RuntimeError) as err:
        logger.info("the choice of forms cannot be kept and is measured again next time: %s", err)
