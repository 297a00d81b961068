"""`qwen3fast generate`: one reply, streamed to standard output."""

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
from qwen3fast.cli.console import checked_argument, read_input
from qwen3fast.results import GenerationResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("prompt", help="a message, or with --raw any text to continue; - reads standard input")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without a chat template")
    parser.add_argument(
        "--stats", action="store_true", help="print token counts and speed to standard error at the end"
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Stream the reply. Returns: the exit status."""
    params = sampling_params(args)
    prompt = checked_argument("the prompt", read_input() if args.prompt == "-" else args.prompt)
    if not prompt:
        what = "standard input is empty; it should hold the prompt" if args.prompt == "-" else "the prompt is empty"
        raise ValueError(what)
    with open_generator(args) as generator:
        has_template = generator.tokenizer is not None and generator.tokenizer.chat_template is not None
        if args.raw or not has_template:
            chunks = generator.stream(prompt, params, on_overflow=args.on_overflow)
        else:
            options = {"enable_thinking": args.think, "on_overflow": args.on_overflow}
            chunks = generator.stream_chat([{"role": "user", "content": prompt}], params, **options)
        result = None
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            result = chunk.result
        print(flush=True)
        if result is not None:
            note_cut(result, args)
        if args.stats and result is not None:
            print(_speed(result), file=sys.stderr)
    return 0


def _speed(result: GenerationResult) -> str:
    m = result.metrics
    return (
        f"{m.prompt_tokens} prompt tokens, first token after {m.time_to_first_token_s:.2f} s; "
        f"{m.new_tokens} new tokens, {m.decode_tok_s:.1f} tokens/s; ended by {result.finish_reason}"
    )
