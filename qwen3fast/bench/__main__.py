"""`python -m qwen3fast.bench`: measure tokens per second with the static KV cache against the no-cache baseline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qwen3fast.bench.main import add_bench_arguments, run_bench


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit status: 0, 1 (modes disagree), 2 (bad options), 130 (Ctrl-C)."""
    parser = argparse.ArgumentParser(prog="python -m qwen3fast.bench", description=__doc__)
    add_bench_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run_bench(args)
    except (ValueError, FileNotFoundError, MemoryError) as err:
        print(f"qwen3fast.bench: error: {err}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
