"""Sentences on a record's environment, conditions and faults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from qwen3fast.bench.metrics import CONDITIONS
from qwen3fast.bench.record import Record


def environment_sentence(record: Record) -> str:
    """Return the machine and the versions."""
    e = record.environment
    machine = str(e["gpu"]) if e.get("gpu") else f"{e.get('cpu', 'an unknown processor')}"
    if not e.get("gpu") and e.get("threads") is not None:
        machine += f" with {e['threads']} thread{'' if e['threads'] == 1 else 's'}"
    memory = e.get("memory_bytes")
    if isinstance(memory, int | float):
        machine += f" and {memory / 1e9:.0f} GB of memory"
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "qwen3fast") if e.get(name))
    return f"Measured on {machine}" + (f"; {versions}" if versions else "") + "."


def trouble(record: Record) -> list[str]:
    """Return the reasons why figures are wrong or incomplete: failed checks, an interruption."""
    failed = [name for name, check in record.checks.items() if not check["passed"]]
    sentences = []
    if failed:
        names = "; ".join(failed)
        sentences.append(
            f"WRONG TOKENS in {len(failed)} of {len(record.checks)} checks, so speeds mean nothing: {names}"
        )
    if record.interrupted:
        sentences.append("The run was interrupted: cases are missing")
    return sentences


def noise_sentences(record: Record) -> list[str]:
    """Return the reasons to doubt the figures."""
    sentences = [f"Noisy: {reason}" for reason in record.noise]
    counts = [e.n for case in record.cases for e in case.metrics.values()]
    if counts and max(counts) == 1:
        sentences.append("Each figure is of a single run: how much it would differ in another is unknown")
    return sentences


def check_rows(record: Record) -> list[tuple[str, bool, str]]:
    """Return (name, passed, its other values) of each check."""
    return [
        (name, check["passed"], words({k: v for k, v in check.items() if k != "passed"}))
        for name, check in record.checks.items()
    ]


def condition_rows(record: Record) -> list[tuple[str, str]]:
    """Return the machine's own speeds: median and range."""
    rows = []
    for name, numbers in record.conditions.items():
        if numbers:
            title, unit, scale = CONDITIONS.get(name, (name.replace("_", " "), "", 1.0))
            middle, low, high = (f"{v * scale:,.3g}" for v in (median(numbers), min(numbers), max(numbers)))
            times = "once" if len(numbers) == 1 else f"{len(numbers)} times, between {low} and {high}"
            rows.append((title, f"{middle} {unit}".strip() + f" (measured {times})"))
    return rows


def pairs(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of a definition list."""
    rows = []
    for name, item in value.items():
        if name.endswith("_bytes") and isinstance(item, int | float):
            rows.append((name.removesuffix("_bytes").replace("_", " "), f"{item / 1e9:.4g} GB"))
        else:
            rows.append((name.replace("_", " "), words(item)))
    return rows


def words(value: Any) -> str:
    """Return any JSON value as a line of text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name.replace('_', ' ')} {words(item)}" for name, item in value.items()) or "none"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Iterable):
        return ", ".join(words(item) for item in value) or "none"
    return "unknown" if value is None else str(value)
