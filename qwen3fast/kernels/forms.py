"""Which of several forms of a computation is the fastest on this machine: measured once, then kept.

A form that wins on one processor loses on another: attention in C++ beats PyTorch's on AMD Zen 4 and 5, and loses to it
on Intel processors with AMX. The rule: no form is used where a plainer one is faster on the machine at hand. Choices
are kept in a file, by processor, versions and shapes. The environment variable QWEN3FAST_FORMS pins them:
"first" takes the first form that serves, always, and measures nothing.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

VARIABLE = "QWEN3FAST_FORMS"
FIRST = "first"
ROUNDS = 3  # the forms take turns; each counts with its best time
TOLERANCE = 1.05  # the first form stays unless another is this much faster


@dataclass(frozen=True)
class Choice:
    """A form that was chosen. seconds: of each form, for the work that was measured; empty if nothing was."""

    name: str
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)


def cache_folder() -> Path:
    """Return the folder for what this machine keeps: `$XDG_CACHE_HOME/qwen3fast`, or `~/.cache/qwen3fast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3fast"


def choose(what: str, key: str, forms: Mapping[str, Callable[[], Any]], version: str = "") -> Choice:
    """Return the fastest of these forms of the same work; a choice of an earlier process is kept.

    what: the computation, such as "prefill attention". key: the shapes it was measured with. forms: name -> a call
    that does the work; the first is used unless another is clearly faster. version: of the code of the forms, beside
    PyTorch's.
    Raises: ValueError for another value of QWEN3FAST_FORMS than "first".
    """
    first = next(iter(forms))
    pinned = os.environ.get(VARIABLE)
    if pinned not in (None, "", FIRST):
        raise ValueError(f"{VARIABLE} must be {FIRST!r} or unset, got {pinned!r}")
    if pinned:
        return Choice(first, f"pinned by {VARIABLE}={FIRST}")
    if len(forms) == 1:
        return Choice(first, "the only form that serves")
    whole_key = " | ".join([what, key, processor(), f"{torch.get_num_threads()} threads", torch.__version__, version])
    known = _read().get(whole_key)
    if isinstance(known, dict) and set(known) == set(forms) and all(isinstance(s, float) for s in known.values()):
        return Choice(_fastest(known), "measured earlier", known)
    seconds = measure(forms)
    _keep(whole_key, seconds)
    choice = Choice(_fastest(seconds), "measured now", seconds)
    logger.info("%s (%s): %s of %s", what, key, choice.name, {n: f"{s * 1e3:.2f} ms" for n, s in seconds.items()})
    return choice


def measure(forms: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the best time of each form in seconds; they take turns, after a first call that does not count."""
    best = dict.fromkeys(forms, float("inf"))
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def processor() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        named = {name.strip(): value.strip() for name, value in fields.items()}
        return f"{named['model name']} ({named.get('cpu family', '?')}/{named.get('model', '?')})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _fastest(seconds: Mapping[str, float]) -> str:
    first, best = next(iter(seconds)), min(seconds, key=lambda name: seconds[name])
    return best if seconds[first] > TOLERANCE * seconds[best] else first


def _file() -> Path:
    return cache_folder() / "forms.json"


def _read() -> dict[str, Any]:
    """Return what is kept; nothing if the file is missing or damaged: it can be measured again."""
    try:
        value = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    return value if isinstance(value, dict) else {}


def _keep(key: str, seconds: Mapping[str, float]) -> None:
    """Add a measurement to the file, which another process may read or replace at any time."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**_read(), key: dict(seconds)}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).replace(_file())
    except (OSError, RuntimeError) as err:
        logger.info("the choice of forms cannot be kept and is measured again next time: %s", err)
