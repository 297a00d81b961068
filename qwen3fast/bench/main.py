"""The measurement command: measure a suite, print its table, write its record (JSON) and its picture (PNG)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from qwen3fast.bench.harness import interruptible
from qwen3fast.bench.options import add_options
from qwen3fast.bench.record import Record, json_text, write_json
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites import SUITES, Suite
from qwen3fast.bench.table import as_text, table_rows
from qwen3fast.bench.view import drawing, picture, sentences
from qwen3fast.files import file_to_write


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a measurement to a parser."""
    titles = "; ".join(f"{name}: {suite.title}" for name, suite in SUITES.items())
    parser.add_argument(
        "--suite", choices=list(SUITES), default="cache", metavar="NAME", help=f"{titles} [%(default)s]"
    )
    add_options(parser)


def run_bench(args: argparse.Namespace) -> int:
    """Measure, print and write. Returns: the exit status 0, 1 if tokens are wrong, 130 after Ctrl-C or SIGTERM."""
    suite = SUITES[args.suite]
    paths = output_paths(args.output, f"{suite.name}-{Path(args.model).name}")
    session = Session(suite.name, suite.options(args))
    if args.contexts is None:
        session.fit_contexts()
    record, failure = session.record, None
    try:
        with interruptible(record):
            suite.run(session)
    except Exception as err:  # such as no memory for the largest case
        if not any(case.samples for case in record.cases):
            raise
        record.interrupted, failure = True, err
    with interruptible(record):
        session.harness.finish()
    if record.interrupted:
        print(f"{'failed' if failure else 'interrupted'}; keeping the measurements so far", file=sys.stderr)
    status = finish(record, suite, paths, args.json)
    if failure is not None:
        raise failure
    return status


def output_paths(output: Path, stem: str) -> tuple[Path, Path]:
    """Return the paths of the record and its picture. output: a folder, or the name of a .json file.

    Raises: FileExistsError if they cannot be written there.
    """
    if output.suffix != ".json":
        output /= f"{time.strftime('%Y%m%d-%H%M%S')}-{stem.replace(':', '-')}.json"
    return file_to_write(output), output.with_suffix(".png")


def finish(record: Record, suite: Suite, paths: tuple[Path, Path], as_json: bool = False) -> int:
    """Write the files, print table, checks and noise. Returns: the exit status."""
    record.cases = [case for case in record.cases if case.samples]
    value = _written(record, paths[0])
    if as_json:
        print(json_text(value), end="")
    elif record.cases:
        print(as_text(table_rows(record, suite.columns), left=len(suite.columns.labels)))
        print("\n".join(["", *sentences(record)]))
        if lines := suite.markdown(record):
            print("\n".join(["", *lines]))
    for name, check in record.checks.items():
        exact = f"{check['exact']} of {check['tokens']} greedy tokens are the reference's argmax"
        verdict = "ok" if check["passed"] else "WRONG: this speed means nothing"
        print(f"{name}: {exact}, worst gap {check['worst_gap']:.2%} of the largest logit: {verdict}", file=sys.stderr)
    for reason in record.noise:
        print(f"noise: {reason}", file=sys.stderr)
    written = [paths[0]]
    if record.cases:
        try:
            drawing("plot").save(picture(record), paths[1])
            written.append(paths[1])
        except (ValueError, KeyboardInterrupt) as err:  # the record is written; an interrupted one may lack a panel
            print(str(err) or "interrupted", file=sys.stderr)
    print("wrote " + " and ".join(map(str, written)), file=sys.stderr)
    return 130 if record.interrupted else int(not record.passed)


def _written(record: Record, path: Path) -> dict[str, Any]:
    """Write a record, which Ctrl-C, pressed again, does not prevent. Returns: its JSON form."""
    while True:
        try:
            value = record.to_dict()
            write_json(value, path)
            return value
        except KeyboardInterrupt:
            record.interrupted = True
