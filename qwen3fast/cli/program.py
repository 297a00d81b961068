"""`qwen3fast COMMAND`: parse the arguments, run the command, report errors in one line and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from qwen3fast._version import __version__
from qwen3fast.cli import chat, generate, info, quantize
from qwen3fast.cli.arguments import num_processes
from qwen3fast.cli.console import abandon_output, flush_output, prepare_streams

COMMANDS = {"generate": generate, "chat": chat, "info": info, "quantize": quantize}
BROKEN_PIPE = 141  # a shell's status of a program ended by SIGPIPE
INTERRUPTED = 130  # and by SIGINT


class LoadedCommand(NamedTuple):
    """A command whose module is imported when the command is used, because it needs optional packages or much time.

    The module has `add_arguments` and `run`, as the modules of COMMANDS, or `main`, which parses the options itself.

    Attributes:
        help: one line. module: its dotted name. extra: the extra of this package to install for it.
    """

    help: str
    module: str
    extra: str = ""


SERVE_HELP = "serve OpenAI's and Anthropic's APIs over HTTP, and a page to chat on"
LOADED = {
    "bench": LoadedCommand("measure tokens per second, with and without a KV cache", "qwen3fast.bench.__main__"),
    "serve": LoadedCommand(SERVE_HELP, "qwen3fast.server.command", "server"),
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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`."""
    epilog = "qwen3fast COMMAND --help lists the options of a command."
    parser = argparse.ArgumentParser("qwen3fast", description="Run Qwen3 models fast, in plain PyTorch.", epilog=epilog)
    parser.add_argument("--version", action="version", version=f"qwen3fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join([*COMMANDS, *LOADED]))
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=_sentence(module.HELP))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    for name, loaded in LOADED.items():
        # Its own parser reads the options, --help included: no prefix makes an option here.
        command = commands.add_parser(name, help=loaded.help, add_help=False, prefix_chars="\0")
        command.add_argument("options", nargs="*")
        command.set_defaults(run=_run_loaded)
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
        return status
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError, FloatingPointError, RuntimeError, ImportError) as err:
        return _fail(err)


def _fail(error: Exception) -> int:
    print(f"qwen3fast: error: {error}", file=sys.stderr)
    return 2 if isinstance(error, ValueError | FileNotFoundError | FileExistsError) else 1


def _run_loaded(args: argparse.Namespace) -> int:
    loaded = LOADED[args.command]
    if num_processes() > 1:
        raise ValueError(f"{args.command} runs in one process; start it without torchrun")
    try:
        module = import_module(loaded.module)
    except ModuleNotFoundError as err:
        if not loaded.extra:
            raise
        raise ImportError(f"{args.command} needs {err.name}; run: pip install 'qwen3fast[{loaded.extra}]'") from err
    if not hasattr(module, "add_arguments"):
        status: int = module.main(args.options)
        return status
    parser = argparse.ArgumentParser(prog=f"qwen3fast {args.command}", description=_sentence(loaded.help))
    module.add_arguments(parser)
    status = module.run(parser.parse_args(args.options))
    return status
