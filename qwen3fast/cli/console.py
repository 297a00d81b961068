"""Standard input and output that do not raise for an encoding or for a closed pipe."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

from qwen3fast.checks import checked_text
from qwen3fast.text.plain_data import replace_surrogates

STRICT = ("strict", "surrogateescape")  # Python's error handlers, unless PYTHONIOENCODING sets another one


def prepare_streams() -> None:
    """Replace characters that standard output cannot encode, and bytes of standard input that are not text.

    Messages are discarded where the shell has closed standard error: `print` would write them to standard output.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open until the program ends
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in STRICT:
            stream.reconfigure(errors="replace")


def checked_argument(name: str, text: str) -> str:
    """Return an argument of the command line that is text. Raises: ValueError naming the place of other bytes."""
    try:
        return checked_text(name, text)
    except ValueError as err:
        place = str(err).partition(", which")[0]
        raise ValueError(f"{place}: bytes that are not in the terminal's encoding; write it in UTF-8") from None


def flush_output() -> None:
    """Flush standard output. Raises: OSError if that fails; BrokenPipeError if its reader has closed it."""
    if sys.stdout is not None:  # it is None where the shell has closed it
        sys.stdout.flush()


def abandon_output() -> None:
    """Discard all further standard output, also at exit: its reader has closed it."""
    with suppress(OSError, ValueError, AttributeError):  # not a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def read_input() -> str:
    """Return all of standard input, without the line break at its end."""
    return "" if sys.stdin is None else sys.stdin.read().removesuffix("\n").removesuffix("\r")


def read_line() -> str | None:
    """Return one line of standard input, characters that UTF-8 cannot encode replaced; None at its end."""
    try:
        return str(replace_surrogates(input("> " if sys.stdin is not None and sys.stdin.isatty() else "")))
    except (EOFError, RuntimeError):  # RuntimeError: there is no standard input
        return None
