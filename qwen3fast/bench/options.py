"""Options of suites, and the names of weight formats."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from qwen3fast.bench.measure import MODES
from qwen3fast.checkpoint.choices import DTYPES
from qwen3fast.quantization.formats import ALL_FORMATS

PLAIN = "plain"
CACHE_SUFFIX = "-kv8"
SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
MEASURED = ("formats", "modes", "contexts", "batch_sizes", "new_tokens", "repetitions", "text")
WEIGHTS = (PLAIN, *ALL_FORMATS)
FORMAT_NAMES = tuple(f"{name}{suffix}" for name in WEIGHTS for suffix in ("", CACHE_SUFFIX))


@dataclass(frozen=True)
class Options:
    """Options of a run, of which each suite reads some.

    formats: "plain" (the weights' own dtype) or a quantization; with "-kv8", keys and values are int8.
    contexts: tokens in the prompt. new_tokens: steps timed per repetition. text: a file; "" for the built-in one.
    limit_s: the run's seconds, None for as many as it takes.
    """

    model: str
    formats: tuple[str, ...]
    repetitions: int
    modes: tuple[str, ...] = ()
    contexts: tuple[int, ...] = (32,)
    batch_sizes: tuple[int, ...] = (1,)
    new_tokens: int = 1
    text: str = ""
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    is_shown: bool = True
    limit_s: float | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser. An option that is not given is None: each suite has its own defaults."""
    add = parser.add_argument
    add("--model", default="random:0.6b", help="hub id, folder, 'tiny' or 'random:SIZE' [%(default)s]")
    add("--formats", type=_formats, metavar="NAMES", help=f"weight formats, comma-separated: {', '.join(WEIGHTS)} "
        f"(plain, or bf16: as in the checkpoint), or one of them and {CACHE_SUFFIX}: int8 keys and values")  # fmt: skip
    add("--modes", type=_modes, metavar="NAMES", help=f"comma-separated: {', '.join(MODES)}")
    add("--contexts", type=counts, metavar="N,N", help="prompt lengths in tokens, comma-separated")
    add("--batch-sizes", type=counts, metavar="N,N", help="requests decoded together, comma-separated")
    add("--new-tokens", type=_count, metavar="N", help="tokens timed after the first, per repetition")
    add("--repetitions", type=_count, metavar="N", help="rounds over all cases; suite quality: windows of the text")
    add("--text", metavar="FILE", help="suite quality: text in UTF-8, of the kind that the model will meet")
    add(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="dtype of the weights; auto: the checkpoint's [%(default)s]",
    )
    add("--threads", type=_count, metavar="N", help="CPU threads [one per core]")
    add("--device", default="auto", help="auto, cpu or cuda [%(default)s]")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="about a minute: fewer cases, one repetition")
    extent.add_argument("--full", action="store_true", help="every case and repetition, without a time limit")
    add("--output", type=Path, default=Path("bench_results"), metavar="PATH", help="folder for record and picture, or "
        "the record's file [%(default)s]")  # fmt: skip
    add("--json", action="store_true", help="print the record as JSON instead of the table")


def split_format(name: str) -> tuple[str | None, str]:
    """Return the `quantization` and `kv_cache_dtype` of a format's name."""
    weights = name.removesuffix(CACHE_SUFFIX)
    return (None if weights == PLAIN else weights), ("int8" if name.endswith(CACHE_SUFFIX) else "auto")


def label_of(format: str, dtype: str) -> str:
    """Return a format's name in tables, in which "plain" is the weights' dtype, such as bf16."""
    return format.replace(PLAIN, SHORT_DTYPES.get(dtype, dtype))


def _count(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= len(text.strip()) <= 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Return an option's comma-separated numbers, sorted, without duplicates.

    Raises: argparse.ArgumentTypeError if one is not a positive whole number.
    """
    return tuple(sorted({_count(part) for part in text.split(",")}))


def _formats(text: str) -> tuple[str, ...]:
    return _names(text.replace("bf16", PLAIN), FORMAT_NAMES, "format")


def _modes(text: str) -> tuple[str, ...]:
    return _names(text, MODES, "mode")


def _names(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Return names in the order of `known`."""
    chosen = {part.strip() for part in text.split(",")}
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in chosen)
