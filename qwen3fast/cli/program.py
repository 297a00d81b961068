"""`qwen3fast COMMAND`: parse the arguments, run the command, report errors in one line and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from qwen3fast._version import __version__
from qwen3fast.checks import num_processes
from qwen3fast.cli.console import abandon_output, flush_output, prepare_streams

BROKEN_PIPE = 141  # a shell's status of a program ended by SIGPIPE
INTERRUPTED = 130  # and by SIGINT


class LoadedCommand(NamedTuple):
    """A command. Its module is imported when the command is used: PyTorch and optional packages take seconds.

    The module has `add_arguments` and `run`, or `main`, which parses the options itself.

    Attributes:
        help: one line. module: its dotted name. extra: the extra of this package to install for it.
        is_parallel: torchrun may start several processes of it.
    """

    help: str
    module: str
    extra: str = ""
    is_parallel: bool = False


GENERATE = "answer one prompt, streamed to standard output"
CHAT = "talk to a model; type /reset to forget the conversation, /exit to leave"
INFO = "show a model's sizes, and the memory of weights and KV cache"
QUANTIZE = "write a quantized checkpoint; errors of 4 bits are corrected on a text"
BENCH = "measure tokens per second, with and without a KV cache"
SERVE = "serve OpenAI's and Anthropic's APIs over HTTP, and a page to chat on"
COMMANDS = {
    "generate": LoadedCommand(GENERATE, "qwen3fast.cli.generate", is_parallel=True),
    "chat": LoadedCommand(CHAT, "qwen3fast.cli.chat", is_parallel=True),
    "info": LoadedCommand(INFO, "qwen3fast.cli.info"),
    "quantize": LoadedCommand(QUANTIZE, "qwen3fast.cli.quantize"),
    "bench": LoadedCommand(BENCH, "qwen3fast.bench.__main__"),
    "serve": LoadedCommand(SERVE, "qwen3fast.server.command", "server"),
    "batch": LoadedCommand("answer a file of requests", "qwen3fast.server.batch", "server"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns: the exit status: 0, 1 (failed, with a message), 2 (bad options), 130 (Ctrl-C), 141 (the output was closed,
    as by `| head`).
    """
    prepare_streams()
    status = 0
    try:
        try:
            status = _run(argv)
        finally:
            flush_output()  # here, where an error can still be handled, not when Python ends
        return status
    except BrokenPipeError:
        abandon_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as err:  # of the flush
        abandon_output()
        return status or _fail(err)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Import a command's module and parse the command line with it.

    Returns: `command`, its options, and `run`, a function of all of them that returns the exit status.
    Raises: ValueError for several processes of a command for one; ImportError for a missing package; SystemExit.
    """
    args = _command_parser().parse_args(argv)
    name, command = args.command, COMMANDS[args.command]
    if not command.is_parallel and num_processes() > 1:
        raise ValueError(f"{name} runs in one process; start it without torchrun")
    try:
        module = import_module(command.module)
    except ModuleNotFoundError as err:
        if not command.extra:
            raise
        raise ImportError(f"{name} needs {err.name}; run: pip install 'qwen3fast[{command.extra}]'") from err
    if not hasattr(module, "add_arguments"):
        args.run = lambda args: module.main(args.options)
        return args
    description = f"{command.help[0].upper()}{command.help[1:]}."
    parser = argparse.ArgumentParser(prog=f"qwen3fast {name}", description=description)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser.parse_args(args.options, args)


def _command_parser() -> argparse.ArgumentParser:
    epilog = "qwen3fast COMMAND --help lists the options of a command."
    parser = argparse.ArgumentParser("qwen3fast", description="Run Qwen3 models fast, in plain PyTorch.", epilog=epilog)
    parser.add_argument("--version", action="version", version=f"qwen3fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        # All that follows is left to the command's own parser, --help included: no prefix makes an option here.
        options = commands.add_parser(name, help=command.help, add_help=False, prefix_chars="\0")
        options.add_argument("options", nargs=argparse.REMAINDER)
    return parser


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = parse(argv)
        status: int = args.run(args)
        return status
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError, FloatingPointError, RuntimeError, ImportError) as err:
        return _fail(err)


def _fail(error: Exception) -> int:
    print(f"qwen3fast: error: {error}", file=sys.stderr)
    return 2 if isinstance(error, ValueError | FileNotFoundError | FileExistsError) else 1
