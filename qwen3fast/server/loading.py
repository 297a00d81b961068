"""The models of `serve` and `batch`: command-line options, and the models that they name."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from qwen3fast.embedder import Embedder
from qwen3fast.generator import Generator
from qwen3fast.reranker import Reranker
from qwen3fast.server.models import AnyModel

logger = logging.getLogger("qwen3fast.server")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `load_models` to a parser."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]SOURCE",
        help="model, or folder of a LoRA adapter; repeatable [tiny]",
    )
    parser.add_argument("--embedder", action="append", default=[], metavar="[NAME=]SOURCE", help="for /v1/embeddings")
    parser.add_argument("--reranker", action="append", default=[], metavar="[NAME=]SOURCE", help="for /v1/rerank")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="LoRA adapter over the one --model, chosen by requests with its name as model; repeatable",
    )
    parser.add_argument("--max-batch-size", type=int, default=8, help="requests decoded together [%(default)s]")
    parser.add_argument("--max-seq-len", type=int, default=4096, help="prompt and reply, tokens [%(default)s]")
    parser.add_argument("--max-queue", type=int, default=256, help="requests that may wait [%(default)s]")
    parser.add_argument("--quantization", help="int8, int4, ... [none]")
    parser.add_argument("--device", default="auto", help="[%(default)s]")
    parser.add_argument("--dtype", default="auto", help="[%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [one per core]")
    parser.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        help="compile before the first request; --no-warmup: only what requests need "
        "[answer at once and compile meanwhile; on GPUs compile before]",
    )


def load_models(args: argparse.Namespace) -> dict[str, AnyModel]:
    """Load the models of the options. Raises: ValueError for a repeated name; as `Generator.from_pretrained`."""
    models: dict[str, AnyModel] = {}

    def add(spec: str, load: type[Generator] | type[Embedder] | type[Reranker], **more: object) -> None:
        name, _, source = spec.rpartition("=")
        name = name or source
        if name in models:
            raise ValueError(f"two models are named {name!r}; write NAME=SOURCE")
        logger.info("loading %s", name)
        common = {"device": args.device, "dtype": args.dtype, "quantization": args.quantization}
        base = _base_of_adapter(source)
        if base is not None:
            source, common["adapter"] = base, source
        models[name] = load.from_pretrained(source, **common, **more)  # type: ignore[arg-type]

    adapters = _adapters(args)
    generators = args.model or ([] if args.embedder or args.reranker else ["tiny"])
    for spec in generators:
        add(
            spec,
            Generator,
            max_batch_size=args.max_batch_size,
            max_seq_len=args.max_seq_len,
            max_queue=args.max_queue,
            adapters=adapters,
            threads=args.threads,
            compile=True if args.warmup else "auto",
        )
        model = list(models.values())[-1]
        assert isinstance(model, Generator), "just added"
        if args.warmup or (args.warmup is None and model.device.type == "cuda"):
            logger.info("compiling for this machine, up to minutes at the first start")
            model.warmup(progress=True)
    for spec in args.embedder:
        add(spec, Embedder)
    for spec in args.reranker:
        add(spec, Reranker)
    return models


def _adapters(args: argparse.Namespace) -> dict[str, str]:
    """Return the sources of the adapters by name. Raises: ValueError for a bad or repeated name, or several models."""
    adapters: dict[str, str] = {}
    for spec in args.adapter:
        name, _, source = spec.partition("=")
        if not name or not source or name in adapters:
            raise ValueError(f"--adapter must be NAME=SOURCE, each name once, got {spec!r:.200}")
        adapters[name] = source
    if adapters and (len(args.model or ()) > 1 or (not args.model and (args.embedder or args.reranker))):
        raise ValueError("--adapter needs a single --model, which the adapters belong to")
    return adapters


def _base_of_adapter(source: str) -> str | None:
    """Return the model that a folder with a LoRA adapter, as PEFT writes it, belongs to; None for other sources.

    Raises: ValueError if the adapter does not name it.
    """
    config = Path(source) / "adapter_config.json"
    if not config.is_file():
        return None
    base = json.loads(config.read_text("utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{config} names no base_model_name_or_path")
    return base
