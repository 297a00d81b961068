"""Reasons to doubt a record's figures: other programs, other virtual machines, memory that changes its speed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Record

BANDWIDTH_SPREAD = 1.2  # 90th over 10th percentile of the probe's samples
MIN_UNSURE = 0.1  # half an interval's width, as a share of the median
STEAL_SHARE = 0.02
MAIN_METRICS = ("decode_tok_s", "tok_s", "seconds", "ttft_s")  # the first that a case has is judged


class NoiseWatch:
    """The load of the machine when a run began, compared with the present when it ends."""

    def __init__(self) -> None:
        self._load, self._ticks = _load_average(), _cpu_ticks()

    def reasons(self) -> list[str]:
        """Return what else used the processors, in words."""
        reasons = []
        if self._load is not None and self._load > 0.5 * (os.cpu_count() or 1):
            reasons.append(f"other programs were running when it began (load average {self._load:.1f})")
        now = _cpu_ticks()
        if self._ticks is not None and now is not None and now[0] > self._ticks[0]:
            share = (now[1] - self._ticks[1]) / (now[0] - self._ticks[0])
            if share > STEAL_SHARE:
                reasons.append(f"{share:.0%} of the processors' time was taken by other virtual machines")
        return reasons


def noise_of(record: Record) -> list[str]:
    """Return the reasons for doubt in a record's own samples: memory whose speed changed, uncertain medians."""
    reasons = []
    if gb_s := record.conditions.get("bandwidth_gb_s"):
        low, high = np.percentile(gb_s, [10, 90])
        if high > BANDWIDTH_SPREAD * low:
            reasons.append(f"the memory's read bandwidth moved between {low:.3g} and {high:.3g} GB/s during the run")
    unsure = []
    for case in record.cases:
        name = next((name for name in MAIN_METRICS if name in case.metrics), None)
        if name is not None and (spread := case.metrics[name].spread) > MIN_UNSURE:
            unsure.append((spread, f"{case.name}: {METRICS[name].title} +-{spread:.0%}"))
    if unsure:
        unsure.sort(reverse=True)
        more = f" and {len(unsure) - 3} more" if len(unsure) > 3 else ""
        reasons.append(f"medians known to no better than {MIN_UNSURE:.0%}: {'; '.join(t for _, t in unsure[:3])}{more}")
    return reasons


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _cpu_ticks() -> tuple[int, int] | None:
    """Return the processor time of the whole machine, and how much of it other virtual machines took (steal)."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    return (sum(fields[:8]), fields[7]) if len(fields) > 7 else None
