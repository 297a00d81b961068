"""`qwen3fast chat`: a conversation, line by line."""

from __future__ import annotations

import argparse
import sys

from qwen3fast.cli.arguments import (
    add_model_arguments,
    add_sampling_arguments,
    note_cut,
    open_generator,
    sampling_params,
)
from qwen3fast.cli.console import checked_argument, read_line
from qwen3fast.generator import Generator
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.text.plain_data import replace_surrogates
from qwen3fast.text.tokenizer import Message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Reply to each line of standard input until it ends. Returns: the exit status."""
    params = sampling_params(args)
    system = checked_argument("--system", args.system) if args.system else None
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    with open_generator(args) as generator:
        print(f"{replace_surrogates(args.model)}: /reset forgets the conversation, /exit leaves", file=sys.stderr)
        while (line := read_line()) is not None:
            line = line.strip()
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(start)
                print("(conversation forgotten)", file=sys.stderr)
            elif line.startswith("/"):
                print("commands: /reset, /exit", file=sys.stderr)
            elif line:
                reply = _reply(generator, [*messages, {"role": "user", "content": line}], params, args)
                if reply is not None:
                    messages += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]
    return 0


def _reply(
    generator: Generator, messages: list[Message], params: SamplingParams, args: argparse.Namespace
) -> str | None:
    """Stream one reply. Returns: its text, or None if it failed or was interrupted (the turn is then forgotten)."""
    text, result = "", None
    try:
        options = {"enable_thinking": args.think, "on_overflow": args.on_overflow}
        for chunk in generator.stream_chat(messages, params, **options):
            print(chunk.text, end="", flush=True)
            text += chunk.text
            result = chunk.result
        print(flush=True)
        if result is not None:
            note_cut(result, args)
        return text
    except KeyboardInterrupt:
        print("\n(interrupted; this turn is forgotten)", file=sys.stderr)
    except (ValueError, TypeError, RuntimeError, FloatingPointError, MemoryError) as err:
        print(f"(cannot reply: {err})", file=sys.stderr)
    return None
