"""`python -m qwen3fast.bench`: measure a suite, or show, compare and test records with a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qwen3fast.bench import commands, compare_command, history, self_test
from qwen3fast.bench.main import add_bench_arguments, run_bench
from qwen3fast.bench.text import visible

DESCRIPTION = "Measure tokens per second with and without the KV cache, or another suite. Commands show the records."


class Command(NamedTuple):
    """A subcommand. run: returns the exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str = ""


COMMANDS = {
    "report": Command("write records as one HTML page that works offline", commands.add_report, commands.run_report),
    "table": Command("print records as Markdown, CSV or text", commands.add_table, commands.run_table),
    "plot": Command("draw the pictures of records", commands.add_plot, commands.run_plot),
    "compare": Command(
        "show what changed between two records beyond noise",
        compare_command.add_arguments,
        compare_command.run,
        compare_command.EPILOG,
    ),
    "history": Command("show a metric over commits, as a table and a picture", history.add_arguments, history.run),
    "self-test": Command("test the harness on fake work of known speed; 3 seconds", lambda _: None, self_test.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run.

    Returns: the exit status: 0, 1 (wrong tokens, or a loss found by compare), 2 (bad options, or nothing that compare
    could judge), 130 (Ctrl-C).
    """
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command].run(args) if args.command else run_bench(args)
    except (ValueError, OSError, MemoryError, ImportError) as err:
        print(f"qwen3fast.bench: error: {visible(err, keep=chr(10))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of a measurement and of all commands."""
    parser = argparse.ArgumentParser(prog="python -m qwen3fast.bench", description=DESCRIPTION)
    add_bench_arguments(parser)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        added = subparsers.add_parser(
            name,
            prog=f"{parser.prog} {name}",
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=command.epilog,
        )
        command.add_arguments(added)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
