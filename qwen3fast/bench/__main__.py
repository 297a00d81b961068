"""`python -m qwen3fast.bench`: measure tokens per second with and without the KV cache, and more (`--suite`).

python -m qwen3fast.bench                          measure; see --help
python -m qwen3fast.bench report RECORD... -o FILE one HTML page of records
python -m qwen3fast.bench table RECORD...          Markdown, CSV or text of records
python -m qwen3fast.bench plot RECORD... -o FOLDER their pictures, drawn anew
python -m qwen3fast.bench compare OLD NEW          what changed beyond noise
python -m qwen3fast.bench history RECORD... -o FILE a figure over commits
python -m qwen3fast.bench self-test                the harness on fake work of known speed
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from qwen3fast.bench import compare_command, history, self_test
from qwen3fast.bench.main import add_bench_arguments, run_bench
from qwen3fast.bench.report.command import report_main
from qwen3fast.bench.show import plot_main, table_main

# First words that are commands of their own: each parses the rest.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "report": report_main,
    "table": table_main,
    "plot": plot_main,
    "compare": compare_command.main,
    "history": history.main,
    "self-test": self_test.main,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 (wrong tokens, a loss found by compare), 2 (bad options, or
    nothing that compare could judge), 130 (Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        return run_bench(build_parser().parse_args(argv))
    except (ValueError, OSError, MemoryError) as err:
        print(f"qwen3fast.bench: error: {err}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of a measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen3fast.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bench_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
