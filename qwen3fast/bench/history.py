"""The `history` command: a metric over commits, of records or of all versions of one record in git."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, load_record
from qwen3fast.bench.statistics import estimate
from qwen3fast.bench.table import as_text
from qwen3fast.bench.text import visible
from qwen3fast.bench.timeline import Point, in_order, versions_in_git
from qwen3fast.bench.view import drawing

MAX_LINES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `history`."""
    add = parser.add_argument
    add("records", type=Path, nargs="*", metavar="RECORD.json")
    add("--git", type=Path, metavar="PATH", help="all versions of this record in git")
    add("-o", "--output", type=Path, default=Path("history.png"), help="PNG or SVG [%(default)s]")
    add("--metric", choices=list(METRICS), default="decode_tok_s", metavar="NAME", help="[%(default)s]")
    add("--labels", type=parse_labels, default={}, help="cases to show, such as mode=cached-compiled,context=32")
    add("--force", action="store_true", help="show other machines and models beside each other")


def run(args: argparse.Namespace) -> int:
    """Print the table and draw the picture. Returns: the exit status, 0.

    Raises: FileNotFoundError, ValueError for records that are missing, invalid, or do not belong together.
    """
    records = [load_record(path) for path in args.records]
    if args.git is not None:
        versions, notes = versions_in_git(args.git)
        records += versions
        print("".join(f"skipped: {visible(note)}\n" for note in notes), end="", file=sys.stderr)
    points = in_order(records, args.force)
    lines = lines_of(points, args.metric, args.labels)
    print(as_text(table(points, lines, args.metric), left=4))
    if len(lines) > MAX_LINES:
        print(f"no picture: {len(lines)} lines; choose at most {MAX_LINES} with --labels", file=sys.stderr)
    else:
        drawing("plot").save(drawing("pictures.history").draw(points, lines, args.metric), args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


def parse_labels(text: str) -> dict[str, str]:
    """Return the names and values of "mode=cached-eager,context=32"."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and equals and value for name, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value,name=value")
    return {name.strip(): value.strip() for name, _, value in pairs}


def lines_of(points: Sequence[Point], metric: str, labels: dict[str, str]) -> dict[str, list[Case | None]]:
    """Return name -> the case in each record, None where a record lacks it. Names leave out labels that all share.

    Raises: ValueError if no case has these labels and the metric, naming the labels that exist.
    """
    cases = [case for point in points for case in point.record.cases]
    chosen = [c for c in cases if all(str(c.labels.get(n)) == v for n, v in labels.items()) and metric in c.metrics]
    if not chosen:
        known = {
            n: sorted({str(c.labels[n]) for c in cases if n in c.labels}) for n in (n for c in cases for n in c.labels)
        }
        words = "; ".join(f"{name}: {', '.join(values)}" for name, values in known.items())
        raise ValueError(f"no case with these labels has {metric}; there are {words}")
    varying = {n for c in chosen for n, v in c.labels.items() if any(o.labels.get(n) != v for o in chosen)}
    lines: dict[str, list[Case | None]] = {}
    for shape in {json.dumps(c.labels, sort_keys=True): c.labels for c in chosen}.values():
        name = Case({n: v for n, v in shape.items() if n in varying}).name or Case(shape).name
        lines[name] = [
            next((c for c in p.record.cases if c.labels == shape and metric in c.metrics), None) for p in points
        ]
    return lines


def table(points: Sequence[Point], lines: dict[str, list[Case | None]], metric: str) -> list[list[str]]:
    """Return a row per case of each record, after the header."""
    rows = [["commit", "date", "run", "case", METRICS[metric].title, "95% interval", "GB/s"]]
    for i, point in enumerate(points):
        gb_s = point.record.conditions.get("bandwidth_gb_s")
        for name, cases in lines.items():
            if (case := cases[i]) is not None:
                e, text = case.metrics[metric], METRICS[metric].text
                interval = "" if e.low is None or e.high is None else f"{text(e.low)} - {text(e.high)}"
                memory = f"{estimate(gb_s).median:.1f}" if gb_s else ""
                rows.append([point.name, point.date, point.record.run["utc"], name, text(e.median), interval, memory])
    return rows
