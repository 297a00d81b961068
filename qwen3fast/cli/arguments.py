"""Options that several commands share, and the objects that they describe."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from qwen3fast.checkpoint.metadata import TOKENIZER_FILES, has_tokenizer, read_config
from qwen3fast.checkpoint.rope_config import with_rope_scaling
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.checks import num_processes
from qwen3fast.cli.console import checked_argument
from qwen3fast.engine.compile import CompileMode
from qwen3fast.generator import Generator
from qwen3fast.options import GeneratorOptions, add_loading_arguments
from qwen3fast.results import GenerationResult
from qwen3fast.sampling_params import SamplingParams

COMPILE_MODES: dict[str, CompileMode] = {"auto": "auto", "always": True, "never": False}
MODEL_HELP = (
    "hub id such as Qwen/Qwen3-0.6B, local folder or .gguf file, 'tiny' (comes with the package), or 'random:0.6b' "
    "(random weights of that size) [%(default)s]"
)


def add_source_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options that name a model."""
    group.add_argument("--model", type=_model, default="tiny", help=MODEL_HELP)
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `open_generator`."""
    group = parser.add_argument_group("model")
    add_source_arguments(group)
    add = group.add_argument
    add_loading_arguments(add)
    add("--max-seq-len", type=int, metavar="N", help="tokens of prompt and reply [4096 or the model's maximum]")
    add("--check-weights", action="store_true", help="refuse weights with NaN or infinity")
    add("--compile", choices=list(COMPILE_MODES), default="auto", help="auto: compile while tokens are generated; "
        "always: before the first token; never [%(default)s]")  # fmt: skip


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sampling_params`."""
    add = parser.add_argument_group("sampling", "Values that are not given come from the checkpoint.").add_argument
    add("--temperature", type=float, metavar="T", help="0 always takes the most likely token")
    add("--top-k", type=int, metavar="K", help="keep the K most likely tokens; 0 keeps all")
    add("--top-p", type=float, metavar="P", help="keep the smallest set of tokens whose probability reaches P")
    add("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the most likely one")
    add("--max-tokens", type=int, metavar="N", help="new tokens at most [the rest of --max-seq-len]")
    add("--on-overflow", choices=("error", "cut"), default="error", help="cut: shorten a prompt that is too long, "
        "from its beginning [%(default)s]")  # fmt: skip
    add("--stop", action="append", default=[], metavar="TEXT", help="end the reply before this text; repeatable")
    add("--seed", type=int, metavar="N", help="the same seed gives the same reply [random]")
    add("--think", action="store_true", help="let the model reason before it answers")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Return the SamplingParams of the options. Raises: ValueError for values out of range."""
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        max_tokens=args.max_tokens,
        stop=tuple(checked_argument("--stop", text) for text in args.stop),
        seed=args.seed,
    )


def open_generator(args: argparse.Namespace) -> Generator:
    """Return the Generator of the options, warmed up with --compile always.

    Raises: ValueError for a model without a tokenizer, before its weights are read; as `from_pretrained`.
    """
    if args.model.startswith("random:"):
        raise ValueError(f"{args.model} has random weights and no tokenizer: it can only be measured (bench)")
    source = resolve_source(args.model, args.revision)  # once: from_pretrained would ask the hub again
    longest = with_rope_scaling(read_config(source), args.rope_scaling).longest_context
    if not has_tokenizer(source):
        raise ValueError(
            f"{source} holds no tokenizer ({TOKENIZER_FILES}), which prompts on the command line need: copy it from "
            "the model that these weights were made from. In Python, prompts may be token ids (Generator)"
        )
    has_terminal = sys.stderr is not None and sys.stderr.isatty()
    generator = Generator.from_pretrained(
        source,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        calibrate=False if args.no_calibrate else None,
        rope_scaling=args.rope_scaling,
        chat_template=args.chat_template,
        generation_config=args.override_generation_config,
        max_seq_len=min(GeneratorOptions.max_seq_len, longest) if args.max_seq_len is None else args.max_seq_len,
        kv_cache_dtype=args.kv_cache_dtype,
        compile=COMPILE_MODES[args.compile],
        cuda_graphs=not args.no_cuda_graphs,
        threads=args.threads,
        check_weights=args.check_weights,
        progress=has_terminal and os.environ.get("RANK", "0") == "0",
        tensor_parallel=num_processes() > 1,
    )
    if args.compile == "always":
        generator.warmup(progress=has_terminal)
    return generator


def note_cut(result: GenerationResult, args: argparse.Namespace) -> None:
    """Say on standard error that a reply was cut, unless it is just as long as was asked for."""
    in_reasoning = bool(result.reasoning) and not result.answer
    if result.finish_reason == "length" and (in_reasoning or args.max_tokens is None):
        where = " inside the reasoning" if in_reasoning else ""
        limits = "--max-seq-len (prompt and reply) and --max-tokens limit it"
        print(f"(cut{where} after {result.metrics.new_tokens} tokens: {limits})", file=sys.stderr)


def _model(text: str) -> str:
    return text or str(Path.cwd())
