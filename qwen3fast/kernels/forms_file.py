"""Measurements of forms on this machine, kept in the cache folder for later processes.

The file may be read, replaced, damaged or removed at any time: what it lacks is measured again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qwen3fast._version import __version__
from qwen3fast.kernels.cpu.levels import cpu_info
from qwen3fast.kernels.cpu.library import own_folder, source_key

logger = logging.getLogger(__name__)


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


def machine() -> str:
    """Return processor, threads and versions."""
    threads = torch.get_num_threads()
    return f"{processor()} | {threads} threads | torch {torch.__version__} | qwen3fast {__version__} {source_key()}"


@cache
def processor() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    name, family, model = (cpu_info(field) for field in ("model name", "cpu family", "model"))
    return f"{name} ({family or '?'}/{model or '?'})" if name else platform.processor() or platform.machine()


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
    """Return the measurements on this machine with these versions, by computation and sizes."""
    end, found = f" | {machine()}", {}
    for key, entry in _read().items():
        choice = _as_choice(entry) if key.endswith(end) else None
        if choice is not None:
            what, _, sizes = key.removesuffix(end).partition(" | ")
            found[what, sizes] = choice
    return found


def path() -> Path:
    """Return where measurements are kept: forms.json in `$XDG_CACHE_HOME/qwen3fast`, or `~/.cache/qwen3fast`."""
    return own_folder() / "forms.json"


def _read() -> dict[str, Any]:
    """Return the contents of the file; {} if it is missing or damaged: forms can be measured again."""
    try:
        value = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    return value if isinstance(value, dict) else {}


def keep(key: str, choice: Choice) -> None:
    """Add a measurement to the file, which another process may read or replace at any time."""
    try:
        file = path()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps({**_read(), key: {"form": choice.name, "seconds": choice.seconds}}, indent=1)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, RuntimeError) as err:
        logger.info("the choice of forms cannot be kept and is measured again next time: %s", err)
