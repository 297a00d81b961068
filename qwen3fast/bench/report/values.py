"""What a drawn point or bar stands for, in words: the estimate of the record that it shows."""

from __future__ import annotations

from math import isclose

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.statistics import Estimate


class Values:
    """Finds a record's estimates by their medians, as figures draw them (times the metric's scale or not)."""

    def __init__(self, record: Record) -> None:
        self._entries = [(case, name, e) for case in record.cases for name, e in case.metrics.items()]

    def words(self, series: str, where: float | None, *values: float) -> str | None:
        """The first of the values that is a median, with its case and interval; None if none is.

        where: a number that one of the case's labels must have. series: of cases with equal medians, one that has it
        as a label is taken.
        """
        for value in values:
            found = [entry for entry in self._entries if _shows(entry, where, value)]
            if found:
                names = {series, series.replace(", ", "-")}  # figures write "cached, eager" for "cached-eager"
                case, name, estimate = max(
                    found, key=lambda entry: not names.isdisjoint(map(str, entry[0].labels.values()))
                )
                label = case.name.replace("_", " ")
                return f"{label}: {METRICS[name].title} {METRICS[name].text(estimate.median)}{sure(name, estimate)}"
        return None


def _shows(entry: tuple[Case, str, Estimate], where: float | None, value: float) -> bool:
    case, name, estimate = entry
    is_value = any(isclose(value, estimate.median * scale, rel_tol=1e-9) for scale in (1.0, METRICS[name].scale))
    return is_value and (where is None or any(label == where for label in case.labels.values()))


def interval(name: str, estimate: Estimate) -> str:
    """The median's 95% interval as the metric is shown, "4.1 to 4.3"; empty of a single value."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = (METRICS[name].text(value) for value in (estimate.low, estimate.high))
    unit = high[high.find(" ") :] if " " in high else ""
    return f"{low.removesuffix(unit)} to {high}" if unit else f"{low} to {high}"


def sure(name: str, estimate: Estimate) -> str:
    """How well a median is known, in words."""
    between = interval(name, estimate)
    return f"; 95% interval {between}, of {estimate.n} runs" if between else "; of a single run"
