"""The `compare` command: the changes between two records, as a table or JSON, with an exit status for CI."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen3fast.bench.compare import Change, Comparison, compare_records
from qwen3fast.bench.metrics import CONDITIONS, METRICS
from qwen3fast.bench.record import Record, load_record
from qwen3fast.bench.statistics import Estimate
from qwen3fast.bench.table import as_text
from qwen3fast.bench.text import visible
from qwen3fast.bench.verdict import BETTER, MASKED, MEANINGS, SAME, UNCLEAR, UNJUDGED, WORSE

EPILOG = "verdicts: " + "; ".join(f"{name}: {meaning}" for name, meaning in MEANINGS.items()) + "."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--metric", action="append", default=[], choices=list(METRICS), metavar="NAME",
                        help="judge only this metric, such as decode_tok_s; may be repeated")  # fmt: skip
    parser.add_argument("--threshold", type=float, default=0.03, help="a smaller change does not count [%(default)s]")
    parser.add_argument("--all", action="store_true", help="also show metrics without a change")
    parser.add_argument("--force", action="store_true", help="also if suites, machines or models differ")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the comparison.

    Returns: the exit status: 0 (nothing got worse), 1 (something did, or NEW has wrong tokens), 2 (nothing could be
    judged).
    Raises: FileNotFoundError, ValueError for records that are missing, invalid, or not comparable.
    """
    old, new = load_record(args.old), load_record(args.new)
    comparison = compare_records(old, new, tuple(args.metric), args.threshold, args.force)
    if args.json:
        text = json.dumps(as_json(comparison, old, new), indent=1)
    else:
        text = visible(as_words(comparison, old, new, args.all), keep="\n")
    _print(text)
    return comparison.status


def as_json(comparison: Comparison, old: Record, new: Record) -> dict[str, Any]:
    """Return everything, with estimates as records write them."""
    return {"suite": new.suite, "old": old.run, "new": new.run, "status": comparison.status} | asdict(comparison)


def as_words(comparison: Comparison, old: Record, new: Record, with_same: bool = False) -> str:
    """Return the machine's change, a table, cases of one record only, notes, and the verdict as text."""
    lines = [f"OLD {_describe(old)}", f"NEW {_describe(new)}"]
    for name, change in comparison.machine.items():
        title, unit, scale = CONDITIONS[name]
        a, b = (sorted(r.conditions[name])[len(r.conditions[name]) // 2] * scale for r in (old, new))
        lines.append(f"{title.lower()}: {a:.3g} {unit} before, {b:.3g} now (x{change.median:.2f})")
    if not comparison.machine:
        lines.append("the machine's own speed was not measured in both: changes are judged as measured only")
    shown = [c for c in comparison.changes if with_same or _is_striking(c, comparison.threshold)]
    if shown:
        rows, left = _rows(shown)
        lines += ["", as_text(rows, left)]
    counts = Counter(change.verdict for change in comparison.changes)
    used = f"threshold {comparison.threshold:.0%}"
    if comparison.timed_threshold > comparison.threshold:
        used += f", for timed figures {comparison.timed_threshold:.0%} since a record is noisy"
    lines += ["", ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()) + f" ({used})"]
    lines += [f"  {verdict}: {meaning}" for verdict, meaning in MEANINGS.items() if verdict in counts]
    lines += [f"only in OLD: {name}" for name in comparison.only_in_old]
    lines += [f"only in NEW: {name}" for name in comparison.only_in_new]
    lines += [f"note: {note}" for note in comparison.notes]
    lines += [f"WRONG TOKENS in NEW: {name}" for name in comparison.failed_checks]
    return "\n".join([*lines, _conclusion(comparison)])


def _is_striking(change: Change, threshold: float) -> bool:
    if change.verdict in (UNCLEAR, UNJUDGED) and change.ratio is not None:
        return not 1 / (1 + threshold) <= change.ratio.median <= 1 + threshold
    return change.verdict != SAME


def _describe(record: Record) -> str:
    commit = (record.run.get("git_commit") or "no commit")[:9] + ("*" if record.run.get("git_dirty") else "")
    return f"{record.suite}, {record.model_name}, {commit}, {record.run['utc']}"


def _rows(changes: list[Change]) -> tuple[list[list[str]], int]:
    labels = list(dict.fromkeys(name for change in changes for name in change.labels))
    rows = [[*labels, "metric", "old", "new", "new/old", "95% interval", "relative to machine", "verdict"]]
    for c in changes:
        values = [METRICS[c.metric].text(value) for value in (c.old, c.new)]
        beside = [f"x{e.median:.3f} {_interval(e)}".strip() for e in c.relative.values()]
        change = [f"x{c.ratio.median:.3f}", _interval(c.ratio)] if c.ratio else ["", ""]
        cells = [str(c.labels.get(name, "")) for name in labels]
        rows.append([*cells, c.metric, *values, *change, "; ".join(beside), c.verdict])
    return rows, len(labels) + 1


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None else f"{estimate.low:.3f}-{estimate.high:.3f}"


def _conclusion(comparison: Comparison) -> str:
    if comparison.status == 2:
        return "nothing could be judged: measure both with --repetitions 3 or more (5 for surer verdicts)"
    worse, better, masked = (len(comparison.of(verdict)) for verdict in (WORSE, BETTER, MASKED))
    if comparison.status == 1:
        return f"WORSE: {worse} changes" + (", and wrong tokens" if comparison.failed_checks else "")
    tail = f", {masked} worth a look" if masked else ""
    return f"nothing got worse beyond noise; {better} better{tail}"


def _print(text: str) -> None:
    """Print. A reader that closes the pipe early, such as head, does not change the exit status."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
