"""The options of suites, and how weight formats are named."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3fast.bench.measure import MODES
from qwen3fast.checkpoint.choices import DTYPES
from qwen3fast.quantization.formats import FORMATS

PLAIN = "plain"
CACHE_SUFFIX = "-kv8"
SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
MEASURED = ("formats", "modes", "contexts", "batch_sizes", "new_tokens", "repetitions")
FORMAT_NAMES = tuple(f"{name}{suffix}" for name in (PLAIN, *FORMATS) for suffix in ("", CACHE_SUFFIX))


@dataclass(frozen=True)
class Options:
    """What to measure. formats: "plain" (the weights as they are) or a quantisation; "-kv8" behind it has keys and
    values in 8 bits. contexts: tokens in the prompt. new_tokens: steps timed in a repetition. Each suite reads some."""

    model: str
    formats: tuple[str, ...]
    repetitions: int
    modes: tuple[str, ...] = ()
    contexts: tuple[int, ...] = (32,)
    batch_sizes: tuple[int, ...] = (1,)
    new_tokens: int = 1
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    is_shown: bool = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser; those not given are None, and each suite has its own defaults."""
    add = parser.add_argument
    add("--model", default="random:0.6b", help="hub id, folder, 'tiny' or 'random:SIZE' [%(default)s]")
    add("--formats", type=_formats, help=f"comma-separated, of {', '.join(FORMAT_NAMES)} ('plain' or 'bf16': as "
        "they are; '-kv8': keys and values in 8 bits)")  # fmt: skip
    add("--modes", type=_modes, help=f"comma-separated, of {', '.join(MODES)}")
    add("--contexts", "--lengths", type=counts, help="prompt lengths, comma-separated")
    add("--batch-sizes", type=counts, help="rows decoded together, comma-separated")
    add("--new-tokens", type=_count, help="tokens to time after the first, in each repetition")
    add("--repetitions", type=_count, help="rounds over all cases, taking turns")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="[%(default)s: the checkpoint's]")
    add("--threads", type=_count, help="CPU threads [one a core]")
    add("--device", default="auto", help="auto, cpu, cuda, ... [%(default)s]")
    add("--quick", action="store_true", help="a look in about a minute: fewer cases, one repetition")
    add("--output", type=Path, default=Path("bench_results"), help="folder for the JSON and the PNG, or the JSON's "
        "name [%(default)s]")  # fmt: skip
    add("--json", action="store_true", help="print the record as JSON instead of the table")


def read_options(args: argparse.Namespace, defaults: dict[str, Any], quick: dict[str, Any]) -> Options:
    """The options of a run: what was given, else the suite's defaults (of a quick look, if that was asked for).

    Raises: ValueError for an option that has no default, which means that the suite does not read it.
    """
    ignored = [name for name in MEASURED if getattr(args, name) is not None and name not in defaults]
    if ignored:
        names = [f"--{name.replace('_', '-')}" for name in (*ignored, *defaults)]
        unread, read = ", ".join(names[: len(ignored)]), ", ".join(names[len(ignored) :])
        raise ValueError(f"this suite does not read {unread}; it reads {read}")
    chosen = defaults | (quick if args.quick else {})
    chosen |= {name: value for name in chosen if (value := getattr(args, name)) is not None}
    same = {name: getattr(args, name) for name in ("model", "device", "dtype", "threads")}
    return Options(**chosen, **same, is_shown=not args.json)


def split_format(name: str) -> tuple[str | None, str]:
    """The `quantization` and `kv_cache_dtype` of a format's name."""
    weights = name.removesuffix(CACHE_SUFFIX)
    return (None if weights == PLAIN else weights), ("int8" if name.endswith(CACHE_SUFFIX) else "auto")


def label_of(format: str, dtype: str) -> str:
    """A format as tables name it: "plain" by the weights' dtype, such as bf16."""
    return format.replace(PLAIN, SHORT_DTYPES.get(dtype, dtype))


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """An option's comma-separated numbers, in order, none twice.

    Raises: argparse.ArgumentTypeError if one is not a positive whole number.
    """
    return tuple(sorted({_count(part) for part in text.split(",")}))


def _formats(text: str) -> tuple[str, ...]:
    return _names(text.replace("bf16", PLAIN), FORMAT_NAMES, "format")


def _modes(text: str) -> tuple[str, ...]:
    return _names(text, MODES, "mode")


def _names(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Names in the order of `known`."""
    chosen = {part.strip() for part in text.split(",")}
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in chosen)
