"""The command line: console.py, arguments.py, then one file per command, and program.py, which parses and runs."""

from qwen3fast.cli.program import main, parse

__all__ = ["main", "parse"]
