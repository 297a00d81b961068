"""The commands on records: `table`, `plot` and `report` show them again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen3fast.bench.record import Record, load_record, write_text
from qwen3fast.bench.table import as_csv, as_markdown, as_text, table_rows, where_measured
from qwen3fast.bench.text import markdown
from qwen3fast.bench.view import drawing, picture, view_of


def add_table(parser: argparse.ArgumentParser) -> None:
    """Add the options of `table`."""
    _add_records(parser)
    parser.add_argument("--format", choices=["markdown", "csv", "text"], default="markdown",
                        help="csv has every metric with its interval [%(default)s]")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, help="file to write instead of standard output")


def run_table(args: argparse.Namespace) -> int:
    """Print or write records as tables. Returns: the exit status."""
    text = tables([load_record(path) for path in args.records], args.format)
    if args.output:
        write_text(text, args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    else:
        print(text, end="")
    return 0


def tables(records: Sequence[Record], format: str) -> str:
    """Return all records as one text. Markdown and text name each record's suite and model if there are several."""
    if format == "csv":
        return as_csv(records)
    parts = []
    for record in records:
        view = view_of(record)
        title, caption = f"{view.title}: {record.model_name}", where_measured(record)
        write = as_markdown if format == "markdown" else as_text
        table = write(table_rows(record, view.columns), len(view.columns.labels))
        if format == "markdown":
            title, caption = f"### {markdown(title)}", markdown(caption)
        parts.append("\n".join([*([title, ""] if len(records) > 1 else []), table, "", caption]) + "\n")
    return "\n".join(parts)


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plot`."""
    _add_records(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("bench_results"), help="folder [%(default)s]")
    parser.add_argument("--format", choices=["png", "svg"], default="png", help="[%(default)s]")


def run_plot(args: argparse.Namespace) -> int:
    """Draw each record's picture into a folder. Returns: the exit status.

    Raises: ValueError for two records of one file name, or a record without the data of its picture.
    """
    targets = [args.output / f"{path.stem}.{args.format}" for path in args.records]
    if len(set(targets)) < len(targets):
        raise ValueError("two records have the same file name, and so would their pictures; use two output folders")
    records = [load_record(path) for path in args.records]
    for path, target, record in zip(args.records, targets, records, strict=True):
        try:
            figure = picture(record)
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from err
        if args.format == "svg":
            write_text(drawing("plot").svg_text(figure), target)
        else:
            drawing("plot").save(figure, target)
        print(f"wrote {target}", file=sys.stderr)
    return 0


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report`."""
    _add_records(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="file to write [%(default)s]")
    parser.add_argument("--title", default="qwen3fast benchmarks", help="[%(default)s]")


def run_report(args: argparse.Namespace) -> int:
    """Write records as one HTML page. Returns: the exit status."""
    records = [load_record(path) for path in args.records]
    write_text(drawing("report.page").render(records, args.title), args.output)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


def _add_records(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD.json", help="files that a benchmark wrote")
