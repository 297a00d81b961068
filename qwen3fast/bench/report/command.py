"""`python -m qwen3fast.bench report RECORD... -o FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen3fast.bench.record import load_record, write_text
from qwen3fast.bench.report.page import render


def report_main(argv: Sequence[str]) -> int:
    """Write the page. Returns the exit status.

    Raises: FileNotFoundError or ValueError for a file that is no valid record.
    """
    parser = argparse.ArgumentParser(
        prog="python -m qwen3fast.bench report", description="Records as one HTML page that needs no network."
    )
    parser.add_argument("records", type=Path, nargs="+", help="JSON files that a benchmark wrote, in the page's order")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="file to write [%(default)s]")
    parser.add_argument("--title", default="qwen3fast benchmarks", help="[%(default)s]")
    args = parser.parse_args(argv)
    write_text(render([load_record(path) for path in args.records], args.title), args.output)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0
