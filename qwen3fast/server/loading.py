"""The models of `serve` and `batch`: command-line options, and the models that they name."""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from qwen3fast.checkpoint.lora.files import find_adapter
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.embedder import Embedder
from qwen3fast.files import read_json
from qwen3fast.generator import Generator
from qwen3fast.options import add_loading_arguments
from qwen3fast.reranker import Reranker
from qwen3fast.server.models import AnyModel

logger = logging.getLogger("qwen3fast.server")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `load_models` to a parser."""
    parser.epilog = (
        "Sampling parameters, such as temperature, are fields of each request; generation_config.json of the model has "
        "their defaults."
    )
    add = parser.add_argument
    add_source = partial(add, action="append", default=[])
    add_source("--model", metavar="[NAME=]SOURCE", help="model that generates: hub id, folder, .gguf file, or folder "
               "of a LoRA adapter; repeatable [tiny]")  # fmt: skip
    add_source("--embedder", metavar="[NAME=]SOURCE", help="model for /v1/embeddings")
    add_source("--reranker", metavar="[NAME=]SOURCE", help="model for /v1/rerank and /v1/score")
    add_source("--adapter", metavar="NAME=SOURCE", help="LoRA adapter of the one --model, which requests choose by its "
               "name; repeatable")  # fmt: skip
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub id, if there is one model")
    add("--max-batch-size", type=int, default=8, metavar="N", help="requests that run together [%(default)s]")
    add("--max-seq-len", type=int, default=4096, metavar="N", help="tokens of prompt and reply together [%(default)s]")
    add("--max-queue", type=int, default=256, metavar="N", help="requests that wait; more are refused [%(default)s]")
    add_loading_arguments(add)
    add("--warmup", action=argparse.BooleanOptionalAction, help="compile before the first request; --no-warmup: only "
        "what requests need [on CPUs answer at once and compile meanwhile, on GPUs compile before]")  # fmt: skip
    add("--no-thinking", action="store_false", dest="enable_thinking", help="reply to conversations without reasoning, "
        "unless a request asks for it (enable_thinking, reasoning_effort)")  # fmt: skip
    add("--no-compile", action="store_true", help="run uncompiled, slower; on CPUs also without C++ operations")


def load_models(args: argparse.Namespace) -> dict[str, AnyModel]:
    """Load the models of the options.

    Raises: ValueError for a repeated or missing name; as `Generator.from_pretrained`.
    """
    models: dict[str, AnyModel] = {}
    adapters = _adapters(args)
    given: dict[type[AnyModel], list[str]] = {Generator: args.model, Embedder: args.embedder, Reranker: args.reranker}
    specs = [(kind, *_name_and_source(spec)) for kind, texts in given.items() for spec in texts]
    specs = specs or [(Generator, "tiny", "tiny")]
    names = [*adapters, *(name for _, name, _ in specs)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two models or adapters are named {twice[0]!r}; give each a name of its own, as NAME=SOURCE")
    if args.revision is not None and len(specs) > 1:
        raise ValueError(f"--revision is for a single model, got {len(specs)}; download them first, and name folders")
    # All files are found, or downloaded, before the first model loads.
    bases = {source: _base_of_adapter(source) or source for _, _, source in specs}
    for kind, _, source in specs:
        if kind is not Generator and bases[source] != source:
            raise ValueError(f"{source} is a LoRA adapter; only --model merges one. Merge it into a checkpoint first")
    found = {s: b if b.startswith("random:") else resolve_source(b, args.revision) for s, b in bases.items()}
    same = ("max_batch_size", "max_seq_len", "max_queue", "kv_cache_dtype", "threads")
    of_generators: dict[str, Any] = {
        **{name: getattr(args, name) for name in same},
        "adapters": {name: find_adapter(source)[1].parent for name, source in adapters.items()},
        "compile": False if args.no_compile else True if args.warmup else "auto",
        "cuda_graphs": not args.no_cuda_graphs,
        "rope_scaling": args.rope_scaling,
        "chat_template": args.chat_template,
        "generation_config": args.override_generation_config,
    }
    for kind, name, source in specs:
        logger.info("loading %s", name)
        options: dict[str, Any] = {"device": args.device, "dtype": args.dtype, "quantization": args.quantization}
        options["calibrate"] = False if args.no_calibrate else None
        if bases[source] != source:
            options["adapter"] = source
        own = of_generators if kind is Generator else {"threads": args.threads}
        model = kind.from_pretrained(found[source], **options, **own)
        models[name] = model
        if isinstance(model, Generator) and (args.warmup or (args.warmup is None and model.device.type == "cuda")):
            logger.info("compiling for this machine; the first start can take minutes")
            model.warmup(progress=True)
    return models


def _name_and_source(spec: str) -> tuple[str, str]:
    name, _, source = ("", "", spec) if os.path.exists(spec) else spec.partition("=")
    if not source and name == spec:
        name, source = "", spec
    if not source:
        raise ValueError(f"{spec!r} names no model; expected [NAME=]SOURCE")
    return name or source, source


def _adapters(args: argparse.Namespace) -> dict[str, str]:
    """Return the sources of the adapters by name. Raises: ValueError for a bad or repeated name, or several models."""
    adapters: dict[str, str] = {}
    for spec in args.adapter:
        name, _, source = spec.partition("=")
        if not name or not source or name in adapters:
            raise ValueError(f"--adapter must be NAME=SOURCE, each name once, got {spec!r:.200}")
        adapters[name] = source
    if adapters and (len(args.model) > 1 or (not args.model and (args.embedder or args.reranker))):
        raise ValueError("--adapter needs a single --model, which the adapters belong to")
    return adapters


def _base_of_adapter(source: str) -> str | None:
    """Return the model that a folder with a LoRA adapter, as PEFT writes it, belongs to; None for other sources.

    Raises: ValueError if the adapter does not name it, or its config is damaged.
    """
    config = Path(source) / "adapter_config.json"
    if not config.is_file():
        return None
    base = read_json(config).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{config} names no base_model_name_or_path")
    return base
