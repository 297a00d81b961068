"""`python -m qwen3fast.bench table` and `plot`: tables and pictures again, from records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen3fast.bench.plot import save
from qwen3fast.bench.record import Record, load_record, write_text
from qwen3fast.bench.svg import svg_text
from qwen3fast.bench.table import as_csv, as_markdown, as_text, table_rows
from qwen3fast.bench.view import caption, picture, view_of


def table_main(argv: Sequence[str]) -> int:
    """The `table` command. Returns the exit status.

    Raises: FileNotFoundError or ValueError for a file that is no valid record.
    """
    parser = argparse.ArgumentParser(prog="python -m qwen3fast.bench table", description="Records as tables.")
    parser.add_argument("records", type=Path, nargs="+", help="JSON files that a benchmark wrote")
    parser.add_argument("--format", choices=["markdown", "csv", "text"], default="markdown",
                        help="csv has every metric with its interval [%(default)s]")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, help="file to write instead of standard output")
    args = parser.parse_args(argv)
    text = tables([load_record(path) for path in args.records], args.format)
    if args.output:
        write_text(text, args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    else:
        print(text, end="")
    return 0


def tables(records: Sequence[Record], format: str) -> str:
    """All records as one text. Markdown and text name each record's suite and model if there are several."""
    if format == "csv":
        return as_csv(records)
    parts = []
    for record in records:
        view = view_of(record)
        write = as_markdown if format == "markdown" else as_text
        lines = [write(table_rows(record, view.columns), len(view.columns.labels)), "", caption(record)]
        if len(records) > 1:
            title = f"{view.title}: {record.model.get('name', 'unnamed model')}"
            lines[:0] = [f"### {title}" if format == "markdown" else title, ""]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def plot_main(argv: Sequence[str]) -> int:
    """The `plot` command. Returns the exit status.

    Raises: FileNotFoundError or ValueError for a file that is no valid record, or that lacks what a picture needs.
    """
    parser = argparse.ArgumentParser(prog="python -m qwen3fast.bench plot", description="Draw records' pictures anew.")
    parser.add_argument("records", type=Path, nargs="+", help="JSON files that a benchmark wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench_results"), help="folder [%(default)s]")
    parser.add_argument("--format", choices=["png", "svg"], default="png", help="[%(default)s]")
    args = parser.parse_args(argv)
    targets = [args.output / f"{path.stem}.{args.format}" for path in args.records]
    if len(set(targets)) < len(targets):
        raise ValueError("two records have the same file name, so their pictures would; draw them into two folders")
    records = [load_record(path) for path in args.records]
    for path, target, record in zip(args.records, targets, records, strict=True):
        try:
            figure = picture(record)
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from err
        if args.format == "svg":
            write_text(svg_text(figure), target)
        else:
            save(figure, target)
        print(f"wrote {target}", file=sys.stderr)
    return 0
