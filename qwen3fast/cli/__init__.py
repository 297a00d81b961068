"""The command line: console.py, arguments.py, then one file per command, and program.py, which parses and runs."""

from qwen3fast.cli.arguments import COMPILE_MODES
from qwen3fast.cli.program import build_parser, main

__all__ = ["COMPILE_MODES", "build_parser", "main"]
