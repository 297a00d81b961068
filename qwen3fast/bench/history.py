"""A figure over commits: `python -m qwen3fast.bench history RECORD...`, or all versions of one record in git.

The memory's bandwidth that was measured with each record is drawn beneath, so that a slower machine is not taken for
slower code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.plot import FAINT, PALETTE, name_ends, new_figure, save, style_axes
from qwen3fast.bench.record import Case, load_record
from qwen3fast.bench.statistics import estimate
from qwen3fast.bench.table import as_text
from qwen3fast.bench.timeline import Point, in_order, versions_in_git

MOST_LINES = 12
MARKERS = ("o", "s")  # the second for those whose colour is taken


def main(argv: Sequence[str]) -> int:
    """Returns the exit status, 0.

    Raises: FileNotFoundError, ValueError for records that are not there, not valid, or that do not belong together.
    """
    parser = argparse.ArgumentParser(
        prog="python -m qwen3fast.bench history", description="A figure over commits: a table and a picture."
    )
    add = parser.add_argument
    add("records", type=Path, nargs="*", metavar="RECORD.json")
    add("--git", type=Path, metavar="PATH", help="all versions of this record that git has")
    add("-o", "--output", type=Path, default=Path("history.png"), help="PNG or SVG [%(default)s]")
    add("--metric", choices=list(METRICS), default="decode_tok_s", metavar="NAME", help="[%(default)s]")
    add("--labels", type=parse_labels, default={}, help="cases to show, such as mode=cached-compiled,context=32")
    add("--force", action="store_true", help="also if machines or models differ")
    args = parser.parse_args(argv)
    records = [load_record(path) for path in args.records]
    if args.git is not None:
        versions, notes = versions_in_git(args.git)
        records += versions
        print("".join(f"skipped: {note}\n" for note in notes), end="", file=sys.stderr)
    points = in_order(records, args.force)
    lines = lines_of(points, args.metric, args.labels)
    rows = table(points, lines, args.metric)
    print(as_text(rows, left=4))
    if len(lines) > MOST_LINES:
        print(f"no picture: {len(lines)} lines; choose at most {MOST_LINES} with --labels", file=sys.stderr)
    else:
        save(draw(points, lines, args.metric), args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


def parse_labels(text: str) -> dict[str, str]:
    """The names and values of "mode=cached-eager,context=32"."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and equals and value for name, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value,name=value")
    return {name.strip(): value.strip() for name, _, value in pairs}


def lines_of(points: Sequence[Point], metric: str, labels: dict[str, str]) -> dict[str, list[Case | None]]:
    """Name of a case -> it in each record, None where a record lacks it. Labels that all share are left out of names.

    Raises: ValueError if no case has such labels and the metric, naming the labels that there are.
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
    """A row for each case of each record, header first."""
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


def draw(points: Sequence[Point], lines: dict[str, list[Case | None]], metric: str) -> Figure:
    """The metric of each line over commits with its intervals; beneath, the memory's bandwidth."""
    first = points[-1].record
    unit = METRICS[metric].unit or METRICS[metric].title
    subtitle = f"{first.model['name']}, suite {first.suite}; bars: 95% intervals; *: of a changed tree"
    figure = new_figure(first, f"{METRICS[metric].title} over commits", subtitle, (11.8, 7.2))
    top, bottom = figure.add_axes((0.075, 0.40, 0.62, 0.46)), figure.add_axes((0.075, 0.15, 0.62, 0.16))
    ends = []
    for i, (name, cases) in enumerate(lines.items()):
        color, marker = PALETTE[i % len(PALETTE)], MARKERS[i // len(PALETTE) % len(MARKERS)]
        shown = [(x, case.metrics[metric]) for x, case in enumerate(cases) if case is not None]
        low = [e.median - (e.median if e.low is None else e.low) for _, e in shown]
        high = [(e.median if e.high is None else e.high) - e.median for _, e in shown]
        xs, ys = [x for x, _ in shown], [e.median for _, e in shown]
        top.errorbar(xs, ys, yerr=[low, high], color=color, marker=marker, markersize=5, capsize=3, label=name)
        ends.append((xs[-1], ys[-1], f"{name}  {METRICS[metric].text(ys[-1])}", color))
    top.set_ylim(bottom=0)
    style_axes(top, "", unit)
    name_ends(top, ends)
    _draw_machine(bottom, points)
    for axes in (top, bottom):
        axes.set_xlim(-0.4, len(points) - 0.6)
        axes.set_xticks(range(len(points)), [""] * len(points))
    names = [f"{point.name}\n{point.date}" for point in points]
    every = -(-len(points) // 10)  # ten names have room
    bottom.set_xticks(range(0, len(points), every), names[::every])
    return figure


def _draw_machine(axes: Axes, points: Sequence[Point]) -> None:
    measured = [(x, p.record.conditions.get("bandwidth_gb_s")) for x, p in enumerate(points)]
    known = [(x, estimate(gb_s)) for x, gb_s in measured if gb_s]
    if known:
        middle = [e.median for _, e in known]
        spread = [[e.median - e.p10 for _, e in known], [e.p90 - e.median for _, e in known]]
        axes.errorbar([x for x, _ in known], middle, yerr=spread, color=FAINT, marker="o", markersize=4, capsize=2)
    axes.set_ylim(bottom=0)
    style_axes(axes, "", "GB/s", "the memory's read bandwidth meanwhile; bars: 10% to 90% of samples")
