"""Verdicts on a metric's change, from its interval and from the change of the machine's own speed."""

from __future__ import annotations

from collections.abc import Collection

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.statistics import Estimate

BETTER, WORSE, SAME, UNCLEAR = "better", "worse", "same", "unclear"
MACHINE, MASKED, UNJUDGED = "machine", "masked", "unjudged"
MEANINGS = {
    BETTER: "better, as measured and relative to the machine's own speed, each with the whole interval",
    WORSE: "worse, as measured and relative to the machine's own speed, each with the whole interval",
    SAME: "the whole interval lies within the threshold",
    UNCLEAR: "an interval, as measured or relative to the machine, crosses the threshold",
    MACHINE: "changed, but not relative to the machine's own speed, which changed as well: not counted",
    MASKED: "no sure change as measured, but one relative to the machine, whose speed changed: worth a look",
    UNJUDGED: "fewer than three repetitions: their interval means nothing",
}

MIN_REPETITIONS = 3  # by chance alone, one of two repetitions on each side lies apart in 3 of 10 cases

# Computed, not timed: the same code gives the same value, so a single one can be judged.
EXACT = {"weight_error", "output_error", "logit_error", "perplexity", "same_token", "accuracy"}


def judge(metric: str, change: Estimate, relative: Collection[Estimate], threshold: float) -> str:
    """Return the verdict. change: new over old. relative: the same over the machine's change, by each yardstick; a
    change must hold against all."""
    measured = _place(metric, change, threshold)
    against = {_place(metric, estimate, threshold) for estimate in relative} - {UNJUDGED}
    if measured in (BETTER, WORSE):
        if against <= {measured}:
            return measured
        return UNCLEAR if against <= {measured, UNCLEAR} else MACHINE
    return MASKED if measured != UNJUDGED and against & {BETTER, WORSE} else measured


def judge_zero(metric: str, old: float, new: float) -> str:
    """Return the verdict for a value of 0 (the error of exact weights), which has no ratio: only computed values that
    differ count."""
    if old == new:
        return SAME
    if metric not in EXACT:
        return UNCLEAR
    return BETTER if (new > old) == METRICS[metric].is_higher_better else WORSE


def _place(metric: str, change: Estimate, threshold: float) -> str:
    """Return the place of the interval: below 1 / (1 + threshold), above 1 + threshold, between, or across."""
    low, high = (change.median, change.median) if metric in EXACT else (change.low, change.high)
    if low is None or high is None or (change.n < MIN_REPETITIONS and metric not in EXACT):
        return UNJUDGED
    top, bottom = 1 + threshold, 1 / (1 + threshold)
    if low > top:
        return BETTER if METRICS[metric].is_higher_better else WORSE
    if high < bottom:
        return WORSE if METRICS[metric].is_higher_better else BETTER
    return SAME if bottom <= low and high <= top else UNCLEAR
